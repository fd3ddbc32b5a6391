import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "codec_throughput.py"


def test_the_throughput_benchmark_runs_on_a_small_layer(capsys):
    spec = importlib.util.spec_from_file_location("codec_throughput", SCRIPT)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)

    benchmark.main(["--rows", "70", "--cols", "130", "--repeat", "1"])

    printed = capsys.readouterr().out
    for name in ("class entropy", "encode", "decode", "verify", "zlib -6", "bz2 -9"):
        assert name in printed
