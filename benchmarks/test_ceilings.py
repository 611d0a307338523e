"""Copy bandwidth and the rate of a large matrix product; other benchmarks measure them when they need them."""


def test_ceilings(benchmark, request):
    ceilings = benchmark.pedantic(request.getfixturevalue, args=("ceilings",), rounds=1)
    benchmark.extra_info["copy, GB/s"] = ceilings.bandwidth / 1e9
    benchmark.extra_info["GEMM, TFLOP/s"] = ceilings.rate / 1e12
    assert ceilings.bandwidth > 0 and ceilings.rate > 0
