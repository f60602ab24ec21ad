"""The compiled operator against the plain one in float64, which `test_operator.py` measures against first principles.

The CUDA kernels run on a GPU where there is one, and everywhere in the emulation of `tests/emulation`.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import ops
from model.ops import reference
from model.ops.compiler import compiler
from model.ops.operator import kernels
from tests import emulation

pytestmark = pytest.mark.skipif(not ops.compiled(), reason="the operator is not compiled here")

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
SHAPES = [(6, 9), (3, 5), (1, 1)]
CHANNELS = [1, 2, 7, 16, 30, 32, 64, 71, 128]
FLAT = tuple(size for shape in SHAPES for size in shape)

on_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and ops.compiled("cuda")), reason="no GPU, or the operator is not compiled for one"
)
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]


Operator = Callable[[Tensor, Sequence[tuple[int, int]], Tensor, Tensor], Tensor]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`torch.ops.raydetr_emulated`."""
    if compiler() is None:
        pytest.skip("no C++ compiler")
    return emulation.load(tmp_path_factory.mktemp("emulation"))


@pytest.fixture(
    params=[
        "cpu",
        "emulated",
        "emulated-deterministic",
        pytest.param("cuda", marks=on_gpu),
        pytest.param("cuda-deterministic", marks=on_gpu),
    ]
)
def operator(request: pytest.FixtureRequest) -> Iterator[Operator]:
    """Every implementation in turn, on tensors of the CPU."""
    device, _, mode = str(request.param).partition("-")
    if device == "emulated":
        request.getfixturevalue("emulated")
    torch.use_deterministic_algorithms(mode == "deterministic")
    yield {"cpu": ops.ms_deform_attn, "emulated": emulation.ms_deform_attn, "cuda": on_cuda}[device]
    torch.use_deterministic_algorithms(False)


def on_cuda(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    return ops.ms_deform_attn(value.cuda(), shapes, locations.cuda(), weights.cuda()).cpu()


class Inputs(NamedTuple):
    """What the operator takes, without the shapes."""

    value: Tensor
    locations: Tensor
    weights: Tensor


def make_inputs(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    *,
    batch: int = 2,
    queries: int = 13,
    heads: int = 3,
    channels: int = 8,
    points: int = 4,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Random inputs, a fifth of the points outside, none within 1e-3 cells of where the lower neighbour changes."""
    generator = torch.Generator().manual_seed(batch + 10 * queries + 100 * channels + 1000 * points)
    size = (batch, queries, heads, len(shapes), points)
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, channels, generator=generator)
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64)[:, None]
    cells = (torch.rand(*size, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2) * sizes - 0.5
    fraction = (cells - cells.floor()).clamp(2e-3, 1 - 2e-3)
    locations = (cells.floor() + fraction + 0.5) / sizes
    weights = torch.rand(size, generator=generator)
    sampling = torch.promote_types(dtype, torch.float32)
    return Inputs(value.to(dtype), locations.to(sampling), weights.to(sampling))


def with_gradients(operator: Operator, shapes: Sequence[tuple[int, int]], inputs: Inputs, grad: Tensor) -> list[Tensor]:
    """Output and the three gradients."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = operator(leaves[0], shapes, leaves[1], leaves[2])
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(output.dtype))]


def assert_agrees(operator: Operator, shapes: Sequence[tuple[int, int]], inputs: Inputs) -> None:
    """Output and gradients are within the tolerance of their type: max error over max of the reference."""
    batch, queries, heads = inputs.weights.shape[:3]
    grad = torch.randn(batch, queries, heads * inputs.value.shape[-1], generator=torch.Generator().manual_seed(1))
    grad = grad.to(inputs.value.dtype)
    exact = with_gradients(reference.ms_deform_attn, shapes, Inputs(*(t.double() for t in inputs)), grad.double())
    ours = with_gradients(operator, shapes, inputs, grad)
    for name, got, wanted in zip(("output", "value", "locations", "weights"), ours, exact, strict=True):
        assert got.shape == wanted.shape
        if wanted.numel():
            error = (got.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
            assert error <= TOLERANCE[inputs.value.dtype], f"{name}: {error:.2e}"


class TestAgainstReference:
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("channels", CHANNELS)
    def test_channels(self, operator: Operator, channels: int, dtype: torch.dtype) -> None:
        assert_agrees(operator, SHAPES, make_inputs(channels=channels, dtype=dtype))

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize(
        ("shapes", "heads", "points"),
        [
            ([(4, 6)], 1, 1),
            ([(1, 1)], 2, 3),
            ([(5, 4), (2, 2)], 1, 8),
            ([(7, 3), (3, 7), (2, 2), (1, 4), (1, 1)], 4, 2),
        ],
        ids=["all one", "one cell", "one head", "five levels"],
    )
    def test_levels_heads_points(
        self, operator: Operator, shapes: list[tuple[int, int]], heads: int, points: int, dtype: torch.dtype
    ) -> None:
        assert_agrees(operator, shapes, make_inputs(shapes, heads=heads, points=points, dtype=dtype))

    @pytest.mark.parametrize("threads", [1, 7], ids=["one thread", "more threads than heads"])
    @pytest.mark.parametrize(
        "queries", [1, 11, 400, 750], ids=["one query", "few: read in place", "many: packed", "the cells: in tiles"]
    )
    def test_queries(self, operator: Operator, queries: int, threads: int) -> None:
        shapes = [(20, 30), (10, 15)]
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            assert_agrees(operator, shapes, make_inputs(shapes, queries=queries, channels=32))
        finally:
            torch.set_num_threads(before)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_many_cells_as_queries(self, operator: Operator, dtype: torch.dtype) -> None:
        shapes = [(43, 50), (5, 11)]
        assert_agrees(
            operator, shapes, make_inputs(shapes, batch=1, queries=2205, heads=1, channels=32, points=2, dtype=dtype)
        )

    def test_batch_65(self, operator: Operator) -> None:
        assert_agrees(operator, [(3, 4)], make_inputs([(3, 4)], batch=65, queries=5))

    @pytest.mark.parametrize("none_of", ["batch", "queries", "heads", "channels", "points"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_empty(self, operator: Operator, none_of: str, dtype: torch.dtype) -> None:
        sizes = {"batch": 2, "queries": 4, "heads": 3, "channels": 8, "points": 4, none_of: 0}
        inputs = make_inputs(**sizes, dtype=dtype)
        shape = (sizes["batch"], sizes["queries"], sizes["heads"] * sizes["channels"])
        output, *gradients = with_gradients(operator, SHAPES, inputs, torch.ones(shape))
        assert output.shape == shape
        assert not output.any()
        for gradient, leaf in zip(gradients, inputs, strict=True):
            assert gradient.shape == leaf.shape
            assert not gradient.any()

    def test_views_that_begin_anywhere(self, operator: Operator) -> None:
        """Dense, but from an odd element on: what loads several at a time has to copy it first."""
        inputs = make_inputs(channels=32)
        shifted = Inputs(*(torch.cat((torch.zeros(1), t.flatten()))[1:].view(t.shape) for t in inputs))
        grad = torch.randn(2 * 13 * 96 + 1)[1:].view(2, 13, 96)
        leaves = [tensor.requires_grad_() for tensor in shifted]
        output = operator(leaves[0], SHAPES, leaves[1], leaves[2])
        found = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
        for ours, expected in zip(found, with_gradients(operator, SHAPES, inputs, grad.clone()), strict=True):
            torch.testing.assert_close(ours, expected)

    def test_not_contiguous(self, operator: Operator) -> None:
        inputs = make_inputs(channels=16)
        scattered = Inputs(*(t.transpose(0, 1).contiguous().transpose(0, 1) for t in inputs))
        assert not scattered.value.is_contiguous()
        grad = torch.randn(13, 2, 48).transpose(0, 1)
        for ours, plain in zip(
            with_gradients(operator, SHAPES, scattered, grad),
            with_gradients(operator, SHAPES, inputs, grad.contiguous()),
            strict=True,
        ):
            torch.testing.assert_close(ours, plain)

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        shapes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=4),
        sizes=st.tuples(*[st.integers(1, most) for most in (3, 20, 4, 40, 5)]),
        dtype=st.sampled_from(list(TOLERANCE)),
    )
    def test_any_shape(
        self,
        operator: Operator,
        shapes: list[tuple[int, int]],
        sizes: tuple[int, int, int, int, int],
        dtype: torch.dtype,
    ) -> None:
        batch, queries, heads, channels, points = sizes
        assert_agrees(
            operator,
            shapes,
            make_inputs(
                shapes, batch=batch, queries=queries, heads=heads, channels=channels, points=points, dtype=dtype
            ),
        )


class TestEdges:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_on_borders_and_far_outside(self, operator: Operator, dtype: torch.dtype) -> None:
        places = torch.tensor([-1e30, -7.0, -0.25, 0.0, 0.125, 0.5, 0.875, 1.0, 1.125, 1.25, 9.0, 1e30], dtype=dtype)
        shapes = [(4, 4)]
        x, y = torch.meshgrid(places, places, indexing="ij")
        locations = torch.stack((x, y), -1).view(1, 144, 1, 1, 1, 2)
        inputs = Inputs(torch.randn(1, 16, 1, 5, dtype=dtype), locations, torch.rand(1, 144, 1, 1, 1, dtype=dtype))
        output, *gradients = with_gradients(operator, shapes, inputs, torch.ones(1, 144, 5))
        torch.testing.assert_close(output, reference.ms_deform_attn(inputs[0], shapes, *inputs[1:]))
        assert all(gradient.isfinite().all() for gradient in gradients)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "-inf"])
    @pytest.mark.parametrize("which", ["locations", "weights", "value"])
    def test_bad_numbers_stay_where_they_are(self, operator: Operator, which: str, bad: float) -> None:
        inputs = make_inputs(channels=32, queries=9)
        if which == "value":
            inputs.value[0, 3, 1, 5] = bad
        else:
            getattr(inputs, which)[0, 4, 1] = bad
        output, *gradients = with_gradients(operator, SHAPES, inputs, torch.ones(2, 9, 96))
        spoilt = ~output.view(2, 9, 3, 32).isfinite()
        assert spoilt.any() or which == "value"
        assert not spoilt[1].any()
        assert not spoilt[0][:, [0, 2]].any()
        if which == "value":
            assert not spoilt[..., :5].any()
            assert not spoilt[..., 6:].any()
        else:
            assert not spoilt[0, [0, 1, 2, 3, 5, 6, 7, 8]].any()
        for gradient in gradients:
            assert gradient[1].isfinite().all()

    def test_infinite_value_outside_of_the_points_is_not_read(self, operator: Operator) -> None:
        value = torch.full((1, 9, 1, 4), float("inf"))
        value[0, 0] = 1.0
        locations = torch.full((1, 1, 1, 1, 1, 2), 1 / 6 - 0.1)  # between the first cell and the outside
        assert operator(value, [(3, 3)], locations, torch.ones(1, 1, 1, 1, 1)).isfinite().all()


class TestGradients:
    @pytest.mark.parametrize("channels", CHANNELS)
    def test_gradcheck(self, operator: Operator, channels: int) -> None:
        shapes = [(3, 4), (1, 1)]
        inputs = make_inputs(shapes, batch=1, queries=2, heads=1, channels=channels, points=1, dtype=torch.float64)
        leaves = [tensor.requires_grad_() for tensor in inputs]
        assert torch.autograd.gradcheck(
            lambda v, x, w: operator(v, shapes, x, w),
            leaves,
            fast_mode=channels > 16,
            eps=1e-7,
            atol=1e-5,
            nondet_tol=1e-9,  # of atomics
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_16_bit_is_summed_in_32(self, operator: Operator, dtype: torch.dtype) -> None:
        """600 points of 600 queries read one cell of 600 channels: sums of ones that would stop at 256 in bfloat16."""
        many = 600
        inputs = Inputs(
            torch.ones(1, 1, 1, many, dtype=dtype),
            torch.full((1, many, 1, 1, many, 2), 0.5),
            torch.ones(1, many, 1, 1, many),
        )
        first = Inputs(inputs.value, inputs.locations[..., :1, :], inputs.weights[..., :1])
        grad = torch.ones(1, many, many)
        _, for_value, _, for_weights = with_gradients(operator, [(1, 1)], first, grad)
        assert (for_value == many).all()
        assert (for_weights == many).all()
        assert (operator(inputs.value, [(1, 1)], inputs.locations[:, :3], inputs.weights[:, :3]) == many).all()

    @pytest.mark.parametrize("wanted", range(1, 8))
    def test_only_wanted_gradients(self, operator: Operator, wanted: int) -> None:
        inputs = make_inputs()
        full = with_gradients(operator, SHAPES, inputs, torch.ones(2, 13, 24))[1:]
        leaves = [t.requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(inputs)]
        operator(leaves[0], SHAPES, leaves[1], leaves[2]).sum().backward()
        for leaf, gradient in zip(leaves, full, strict=True):
            assert (leaf.grad is not None) == leaf.requires_grad
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, gradient)

    def test_bit_equal_for_any_number_of_threads(self) -> None:
        shapes = [(20, 30), (5, 8)]
        inputs = make_inputs(shapes, queries=300, heads=2, channels=32)
        grad = torch.randn(2, 300, 64)
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 1, 2, 3, 7, 16):
                torch.set_num_threads(threads)
                results.append(with_gradients(ops.ms_deform_attn, shapes, inputs, grad))
        finally:
            torch.set_num_threads(before)
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))

    def test_instruction_set_is_no_wider_than_asked(self) -> None:
        sets = ["default", "avx2", "avx512"]
        assert kernels is not None
        assert sets.index(kernels.CPU_KERNELS) <= sets.index(os.environ.get("RAYDETR_CPU", "avx512"))

    @pytest.mark.parametrize("limit", ["default", "avx2"])
    def test_every_instruction_set(self, limit: str) -> None:
        environment = {**os.environ, "RAYDETR_CPU": limit, "PYTHONPATH": os.pathsep.join(sys.path)}
        tests = [
            f"{__file__}::TestAgainstReference::test_channels[cpu-{channels}-torch.float32]" for channels in (32, 71)
        ]
        tests.append(f"{__file__}::TestGradients::test_instruction_set_is_no_wider_than_asked")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout
        assert "3 passed" in done.stdout


class TestOrderOfQueries:
    @pytest.mark.parametrize(
        "shapes",
        [
            [(1, 1)],
            [(7, 5)],
            [(8, 8)],
            [(9, 17)],
            [(16, 3), (8, 2), (4, 1)],
            [(100, 167), (50, 84), (25, 42), (13, 21)],
        ],
        ids=str,
    )
    def test_every_cell_once(self, emulated: Any, shapes: list[tuple[int, int]]) -> None:
        queries = emulated.tiles([size for shape in shapes for size in shape])
        assert sorted(queries) == list(range(sum(h * w for h, w in shapes)))

    def test_slots_in_a_row_are_tiles(self, emulated: Any) -> None:
        queries = emulated.tiles([16, 24, 7, 9])
        for first in range(0, 16 * 24, 64):
            tile = queries[first : first + 64]
            assert len({q // 24 for q in tile}) == len({q % 24 for q in tile}) == 8

    @given(dividend=st.integers(0, 2**31 - 1), by=st.integers(1, 2**31 - 1))
    def test_division(self, emulated: Any, dividend: int, by: int) -> None:
        for number in (dividend, dividend // by * by, max(dividend // by * by - 1, 0)):
            assert emulated.divide(number, by) == list(divmod(number, by))


@on_gpu
class TestOnGpu:
    def test_same_bits_in_deterministic_mode(self) -> None:
        shapes = [(20, 30), (5, 8)]
        inputs = make_inputs(shapes, queries=1000, heads=2, channels=32, dtype=torch.bfloat16)
        grad = torch.randn(2, 1000, 64)
        torch.use_deterministic_algorithms(True)
        try:
            first, *others = (with_gradients(on_cuda, shapes, inputs, grad) for _ in range(5))
        finally:
            torch.use_deterministic_algorithms(False)
        for other in others:
            assert all(map(torch.equal, first, other))

    @pytest.mark.parametrize("deterministic", [False, True])
    def test_captured_in_a_graph(self, deterministic: bool) -> None:
        inputs, others = (
            Inputs(*(tensor.cuda() for tensor in make_inputs(batch=batch, channels=32))) for batch in (2, 3)
        )
        grad = torch.randn(2, 13, 96, device="cuda")

        def both() -> list[Tensor]:
            output = torch.ops.raydetr.ms_deform_attn(inputs.value, FLAT, *inputs[1:])
            arguments = (grad, inputs.value, FLAT, *inputs[1:], True, True, True, deterministic)
            return [output, *torch.ops.raydetr.ms_deform_attn_backward(*arguments)]

        both()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = both()
        for mine, other in zip(inputs, others, strict=True):
            mine.copy_(other[:2])
        graph.replay()
        for got, wanted in zip(captured, both(), strict=True):
            torch.testing.assert_close(got, wanted)

    def test_on_the_current_stream(self) -> None:
        inputs = Inputs(*(tensor.cuda() for tensor in make_inputs([(200, 200)], queries=5000, channels=32)))
        wanted = ops.ms_deform_attn(inputs.value * 2, [(200, 200)], *inputs[1:])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # another stream would not wait for this
            got = ops.ms_deform_attn(inputs.value * 2, [(200, 200)], *inputs[1:])
        stream.synchronize()
        assert torch.equal(got, wanted)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
    def test_on_a_device_that_is_not_the_current_one(self) -> None:
        inputs = make_inputs(channels=32)
        there = Inputs(*(tensor.to("cuda:1") for tensor in inputs))
        assert torch.cuda.current_device() == 0
        got = with_gradients(ops.ms_deform_attn, SHAPES, there, torch.ones(2, 13, 96, device="cuda:1"))
        assert torch.cuda.current_device() == 0
        for ours, wanted in zip(got, with_gradients(on_cuda, SHAPES, inputs, torch.ones(2, 13, 96)), strict=True):
            torch.testing.assert_close(ours.cpu(), wanted)

    @pytest.mark.parametrize("deterministic", [False, True])
    def test_more_elements_than_32_bits_count(self, deterministic: bool) -> None:
        if torch.cuda.mem_get_info()[0] < 40 * 2**30:
            pytest.skip("less than 40 GiB free")
        batch, heads, channels = 2, 8, 136
        kind = {"device": "cuda", "dtype": torch.bfloat16}
        value = torch.randn(batch, 1024 * 1024, heads, channels, **kind)
        assert value.numel() > 2**31
        locations = torch.rand(batch, 64, heads, 1, 4, 2, device="cuda")
        weights = torch.rand(batch, 64, heads, 1, 4, device="cuda")
        grad = torch.randn(batch, 64, heads * channels, **kind)

        def both(part: slice) -> list[Tensor]:
            tensors = (value[part], [1024, 1024], locations[part], weights[part])
            output = torch.ops.raydetr.ms_deform_attn(*tensors)
            gradients = torch.ops.raydetr.ms_deform_attn_backward(grad[part], *tensors, True, True, True, deterministic)
            return [output, *gradients]

        whole = both(slice(0, 2))
        for got, wanted in zip(whole, both(slice(1, 2)), strict=True):
            torch.testing.assert_close(got[1:], wanted)


class TestInTorch:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_opcheck(self, dtype: torch.dtype, device: str) -> None:
        value, locations, weights = (tensor.to(device).requires_grad_() for tensor in make_inputs(dtype=dtype))
        torch.library.opcheck(torch.ops.raydetr.ms_deform_attn, (value, FLAT, locations, weights))

    @pytest.mark.parametrize("device", DEVICES)
    def test_opcheck_backward(self, device: str) -> None:
        value, locations, weights = (tensor.to(device) for tensor in make_inputs())
        for wanted in [(True, True, True), (True, False, False), (False, True, False)]:
            arguments = (torch.randn(2, 13, 24, device=device), value, FLAT, locations, weights, *wanted, True)
            torch.library.opcheck(torch.ops.raydetr.ms_deform_attn_backward, arguments)

    def test_compile_with_dynamic_shapes(self) -> None:
        def step(value: Tensor, height: int, width: int, locations: Tensor, weights: Tensor) -> Tensor:
            return ops.ms_deform_attn(value * 2, [(height, width)], locations, weights).sin()

        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        for height, width, queries in [(4, 5, 6), (7, 3, 9), (8, 8, 5)]:
            inputs = make_inputs([(height, width)], queries=queries)
            results = []
            for function in (compiled, step):
                leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
                output = function(leaves[0], height, width, leaves[1], leaves[2])
                results.append([output, *torch.autograd.grad(output.sum(), leaves)])
            for ours, eager in zip(*results, strict=True):
                torch.testing.assert_close(ours, eager)

    @pytest.mark.parametrize("device", DEVICES)
    def test_autocast_keeps_locations_and_weights(self, device: str) -> None:
        inputs = Inputs(*(tensor.to(device) for tensor in make_inputs(channels=32)))
        with torch.autocast(device, dtype=torch.bfloat16):
            output = ops.ms_deform_attn(inputs.value, SHAPES, inputs.locations, inputs.weights)
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, ops.ms_deform_attn(inputs.value.bfloat16(), SHAPES, *inputs[1:]))

    def test_autocast_leaves_integers_to_be_refused(self) -> None:
        inputs = make_inputs()
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="value: expected float64"):
            ops.ms_deform_attn(inputs.value.long(), SHAPES, inputs.locations, inputs.weights)

    def test_no_second_derivative(self) -> None:
        value, locations, weights = (tensor.requires_grad_() for tensor in make_inputs())
        output = ops.ms_deform_attn(value, SHAPES, locations, weights)
        (gradient,) = torch.autograd.grad(output.sum(), value, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            gradient.pow(2).sum().backward()

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"value": torch.zeros(2, 70, 24)}, "value: expected"),
            ({"locations": torch.zeros(2, 13, 3, 3, 4)}, "sampling_locations: expected"),
            ({"weights": torch.zeros(2, 13, 3, 3, 4).double()}, "attention_weights: expected torch.float32"),
            ({"value": torch.zeros(2, 71, 3, 8)}, "do not add up to the 71 cells"),
            ({"weights": torch.zeros(2, 12, 3, 3, 4)}, "do not fit attention_weights"),
        ],
    )
    def test_shapes_alone_are_checked_too(self, changed: dict[str, Tensor], message: str) -> None:
        given = make_inputs()._replace(**changed)
        value, locations, weights = (tensor.to("meta") for tensor in given)
        with pytest.raises(ValueError, match=message):
            torch.ops.raydetr.ms_deform_attn(value, FLAT, locations, weights)

    def test_low_precision_locations_are_raised(self) -> None:
        value, locations, weights = make_inputs(dtype=torch.bfloat16)
        output = ops.ms_deform_attn(value, SHAPES, locations.bfloat16(), weights.bfloat16())
        assert torch.equal(
            output, ops.ms_deform_attn(value, SHAPES, locations.bfloat16().float(), weights.bfloat16().float())
        )


class TestChecks:
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"value": torch.zeros(2, 70, 24)}, "value: expected"),
            ({"value": torch.zeros(2, 70, 3, 8, dtype=torch.int64)}, "value: expected float64"),
            ({"value": torch.zeros(2, 71, 3, 8)}, "spatial_shapes: the levels have 70"),
            ({"shapes": [6, 9, 3, 5, 1]}, "spatial_shapes: expected height and width"),
            ({"shapes": [6, 9, 3, 5, 1, 0]}, "spatial_shapes: level 2 is 1 x 0"),
            ({"shapes": [6, 9, 4, 4]}, "sampling_locations: "),
            ({"locations": torch.zeros(2, 13, 3, 3, 4)}, "sampling_locations: expected"),
            ({"locations": torch.zeros(2, 13, 4, 3, 4, 2)}, "sampling_locations: "),
            ({"locations": torch.zeros(2, 13, 3, 3, 4, 2).double()}, "sampling_locations: expected Float"),
            ({"locations": torch.zeros(2, 13, 3, 3, 4, 2, device="meta")}, "sampling_locations: not on the device"),
            ({"weights": torch.zeros(2, 13, 3, 12)}, "attention_weights: expected"),
            ({"weights": torch.zeros(2, 12, 3, 3, 4)}, "attention_weights: "),
            ({"weights": torch.zeros(2, 13, 3, 3, 4).bfloat16()}, "attention_weights: expected Float"),
        ],
    )
    def test_names_the_argument(self, changed: dict[str, object], message: str) -> None:
        value, locations, weights = make_inputs()
        arguments = {"value": value, "shapes": FLAT, "locations": locations, "weights": weights, **changed}
        with pytest.raises((RuntimeError, ValueError), match=message):
            torch.ops.raydetr.ms_deform_attn(*arguments.values())

    def test_gradient_of_the_wrong_size(self) -> None:
        value, locations, weights = make_inputs()
        with pytest.raises(RuntimeError, match="grad_output: expected"):
            torch.ops.raydetr.ms_deform_attn_backward(
                torch.zeros(2, 13, 23), value, FLAT, locations, weights, True, True, True, False
            )
