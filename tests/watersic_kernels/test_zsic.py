import pytest
import torch

from watersic_hf.core.zsic import zsic, zsic_block
from watersic_hf.testing import assert_close, random_layer
from watersic_kernels.zsic import ROWS, _block_kernel, quantize_block

# they also run on a CPU, in Triton's interpreter
pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 8


def problem(rows, columns, dtype, seed=0):
    weight_AN, cov_NN = random_layer(rows, columns, seed=seed)
    chol_NN = torch.linalg.cholesky(cov_NN + 1e-3 * torch.eye(columns, dtype=cov_NN.dtype))
    target_AN = weight_AN @ chol_NN
    return target_AN.to(DEVICE, dtype), chol_NN.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (ROWS, 5), (2 * ROWS + 3, 12)])
def test_block_matches_the_reference_and_writes_nothing_else(shape, dtype):
    target_AN, chol_NN = problem(*shape, dtype)
    rows, columns = shape
    step = 0.7 * float(target_AN.abs().mean())

    def run(block_step):
        # rows of a wider matrix, between guards
        work_BA = torch.full((columns + 2, rows + GUARD), 7.5, dtype=dtype, device=DEVICE)
        codes_BA = torch.full((columns + 2, rows + GUARD), 99, dtype=torch.int32, device=DEVICE)
        shrinkage_B = torch.full((columns + 2,), 7.5, dtype=dtype, device=DEVICE)
        work_BA[1:-1, :rows] = target_AN.T
        target_BA, block_codes_BA = work_BA[1:-1, :rows], codes_BA[1:-1, :rows]
        block_step(target_BA, chol_NN, step, block_codes_BA, shrinkage_B[1:-1])
        return work_BA, codes_BA, shrinkage_B

    found, wanted = run(quantize_block), run(zsic_block)

    assert torch.equal(found[1], wanted[1])
    for tensor, other in zip(found, wanted, strict=True):
        assert_close(tensor.double(), other.double(), tolerance=1e-6)


def test_whole_recursion_matches_the_reference():
    target_AN, chol_NN = problem(50, 70, torch.float64)

    codes_AN, shrinkage_N = zsic(target_AN, chol_NN, 0.5, block_step=quantize_block)

    wanted_AN, wanted_N = zsic(target_AN, chol_NN, 0.5)
    assert torch.equal(codes_AN, wanted_AN)
    assert_close(shrinkage_N, wanted_N, tolerance=1e-12)


def test_ties_round_to_even_and_a_zero_column_has_zero_gain():
    target_AN = torch.tensor([[0.5, 0.1], [1.5, 0.0], [-2.5, -0.2]], dtype=torch.float64)
    chol_NN = torch.eye(2, dtype=torch.float64, device=DEVICE)

    codes_AN, shrinkage_N = zsic(target_AN.to(DEVICE), chol_NN, 1.0, block_step=quantize_block)

    assert codes_AN.tolist() == [[0, 0], [2, 0], [-2, 0]]
    assert shrinkage_N.tolist() == [1, 0]


@pytest.mark.skipif(DEVICE == "cuda", reason="the second program is missing in the interpreter")
def test_programs_that_wait_in_vain_end_in_an_error():
    target_AN, chol_NN = problem(ROWS, 3, torch.float64)

    def alone(target_BA, chol_BB, step, codes_BA, shrinkage_B):
        step_1, sums_B2P = target_BA.new_full((1,), step), target_BA.new_empty(3, 2, 2)
        arrived = torch.zeros(1, dtype=torch.int32)
        tensors = (target_BA, chol_BB, step_1, codes_BA, shrinkage_B, sums_B2P, arrived)
        sizes = (3, ROWS, ROWS, ROWS, *chol_BB.stride(), 2, 4)
        _block_kernel[(1,)](*tensors, *sizes, ROWS=ROWS, PROGRAMS=2)

    with pytest.raises(RuntimeError, match="gains of 3 columns are not finite"):
        zsic(target_AN, chol_NN, 0.5, block_step=alone)
