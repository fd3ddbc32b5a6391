"""Triton kernels of watersic_hf; `watersic_hf.nn.ops` is the only module that imports them.

Nothing here imports watersic_hf.  The reference of each kernel lives there, and the tests compare
the two.
"""

if __name__ != "watersic_kernels":
    raise ImportError(
        f"watersic_kernels was imported as {__name__!r}; put the folder `kernels` on the path "
        f"and import `watersic_kernels`: two copies would register the same operators twice."
    )
