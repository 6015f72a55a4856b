"""Options of DDP and FSDP2: each works, or is refused by name before ranks can drift apart."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import adaptbatch as ab
from tests.accumulate.test_distributed import sharding
from tests.models import batches, sgd, small_model, squared
from tests.processes import spawn

DATA = 6


def run(model: nn.Module, rank: int, steps: int = 2, made: Any = sgd, **options: Any) -> dict[str, Any]:
    """Three windows of two micro-batches a rank, or what was said instead."""
    dtype = next(model.parameters()).dtype
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            c = ab.BatchController(model, made(model), rule=ab.Fixed(steps), **options)
            for x in c.micro_batches(batches([4] * DATA, seed=rank, dtype=dtype)):
                c.backward(squared(model, x), weight=4)
                if c.step_due:
                    c.step()
        except (RuntimeError, ValueError) as error:
            return {"error": str(error)}
    found = {"rows": c.history.to_pandas(), "warnings": [str(one.message) for one in caught]}
    parameters = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]
    return found | {"parameters": parameters}


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters())


def half(hook: Any) -> Callable[[int], Any]:
    def job(rank: int) -> Any:
        model = DistributedDataParallel(small_model(dtype=torch.float32))
        model.register_comm_hook(None, hook)
        return run(model, rank)

    return job


def plain(rank: int) -> Any:
    return run(DistributedDataParallel(small_model()), rank)


def plain_float(rank: int) -> Any:
    return run(DistributedDataParallel(small_model(dtype=torch.float32)), rank)


def static_graph(rank: int) -> Any:
    return run(DistributedDataParallel(small_model(), static_graph=True), rank)


def find_unused(rank: int) -> Any:
    return run(DistributedDataParallel(small_model(), find_unused_parameters=True), rank)


def compiled(rank: int) -> Any:
    return run(torch.compile(DistributedDataParallel(small_model()), backend="eager"), rank)


def no_buffers(rank: int) -> Any:
    return run(DistributedDataParallel(small_model(), broadcast_buffers=False, bucket_cap_mb=1), rank)


def mixed_precision(rank: int) -> Any:
    from torch.nn.parallel.distributed import _MixedPrecision

    half_precision = _MixedPrecision(param_dtype=torch.float16, reduce_dtype=torch.float16, buffer_dtype=torch.float16)
    return run(DistributedDataParallel(small_model(dtype=torch.float32), mixed_precision=half_precision), rank)


def delayed(rank: int) -> Any:
    inner = small_model()
    named = [(name, p) for name, p in inner.named_parameters() if name == "0.bias"]
    model = DistributedDataParallel(
        inner, delay_all_reduce_named_params=named, param_to_hook_all_reduce=inner[2].weight
    )
    return run(model, rank)


def power(rank: int) -> Any:
    model = DistributedDataParallel(small_model(dtype=torch.float32))
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return run(model, rank)


def joined(rank: int) -> Any:
    model = DistributedDataParallel(small_model())
    c = ab.BatchController(model, sgd(model), rule=ab.Fixed(2))
    try:
        with model.join():
            next(iter(c.micro_batches(batches([4] * 2, seed=rank))))
    except RuntimeError as error:
        return {"error": str(error)}
    return {}


def thawed(rank: int) -> Any:
    inner = small_model()
    inner[0].requires_grad_(False)
    model = DistributedDataParallel(inner)
    inner[0].requires_grad_(True)
    return run(model, rank)


def thawed_under_way(rank: int) -> Any:
    inner = small_model()
    inner[0].requires_grad_(False)
    model = DistributedDataParallel(inner)
    optimizer = sgd(model)
    c = ab.BatchController(model, optimizer, rule=ab.Fixed(1))
    for index, x in enumerate(c.micro_batches(batches([4] * 2, seed=rank))):
        if index == 1:
            inner[0].requires_grad_(True)
        try:
            c.backward(squared(model, x), weight=4)
        except RuntimeError as error:
            return {"error": str(error)}
        c.step()
    return {}


def frozen_since(rank: int) -> Any:
    """Frozen after it was wrapped, which DDP has a switch for, and thawed again."""
    inner = small_model()
    model = DistributedDataParallel(inner, find_unused_parameters=True)
    inner[0].requires_grad_(False)
    c = ab.BatchController(model, sgd(model), rule=ab.Fixed(1))
    for index, x in enumerate(c.micro_batches(batches([4] * 4, seed=rank))):
        inner[0].requires_grad_(index >= 2)
        c.backward(squared(model, x), weight=4)
        c.step()
    return {"parameters": [p.detach() for p in model.parameters()]}


def ignored(rank: int) -> Any:
    inner = small_model()
    names = [name for name, _ in inner[0].named_parameters(prefix="0")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(inner, names)
    return run(DistributedDataParallel(inner), rank)


def beside(rank: int) -> Any:
    """A head that was not wrapped."""
    model, head = DistributedDataParallel(small_model()), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    try:
        ab.BatchController(model, optimizer)
    except RuntimeError as error:
        return {"error": str(error)}
    return {}


def apart(rank: int, way: str) -> Any:
    """What keeps DDP from synchronising the last micro-batch of a window, and a window after it."""
    model = DistributedDataParallel(small_model())
    c = ab.BatchController(model, sgd(model), rule=ab.Fixed(2))
    said = ""
    for index, x in enumerate(c.micro_batches(batches([4] * DATA, seed=rank))):
        wrong = index < 2
        around = model.no_sync() if wrong and way == "no_sync" else nullcontext()
        try:
            with around:
                loss = squared(model.module if wrong and way == "module" else model, x)
            # DDP looks at the forward pass.
            c.backward(loss, weight=4)
        except RuntimeError as error:
            said = str(error)
            c.discard_window()
        if c.step_due:
            c.step()
    return {"error": said, "parameters": [p.detach() for p in model.parameters()], "steps": len(c.history)}


def sharded(rank: int, ignored: int = 0, **options: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = small_model()
    fully_shard(model, ignored_params=set(list(model.parameters())[:ignored]))
    return run(model, rank, **options)


def metered(rank: int) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = small_model()
    fully_shard(model)
    try:
        ab.NoiseMeter(model, sgd(model))
    except ValueError as error:
        return {"error": str(error)}
    return {}


def unheard(rank: int) -> Any:
    """A sharded layer whose weight is used, and whose forward pass is not."""
    from torch.distributed.fsdp import fully_shard

    model = small_model()
    model.register_module("beside", nn.Linear(2, 2).double())
    layers = list(model)[:3]
    model.forward = lambda x: layers[2](layers[1](layers[0](x)))
    for part in (model.beside, model):
        fully_shard(part)
    c = ab.BatchController(model, sgd(model), rule=ab.Fixed(1))
    loss = squared(model, batches([4], seed=rank)[0]) + model.beside.weight.full_tensor().square().sum()
    try:
        c.backward(loss, weight=4)
    except RuntimeError as error:
        return {"error": str(error)}
    return {}


def flattened(rank: int) -> Any:
    """FSDP1."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(small_model(), device_id=torch.device("cpu"))
    return run(model, rank)


JOBS: dict[str, Callable[[int], Any]] = {
    job.__name__: job
    for job in (
        plain,
        plain_float,
        static_graph,
        find_unused,
        compiled,
        no_buffers,
        delayed,
        mixed_precision,
        power,
        joined,
        thawed,
        thawed_under_way,
        frozen_since,
        ignored,
        beside,
    )
} | {
    "fp16": half(default_hooks.fp16_compress_hook),
    "left_no_sync": partial(apart, way="no_sync"),
    "unwrapped_forward": partial(apart, way="module"),
}
if not sharding.args[0]:
    JOBS |= {
        "sharded_ignored": partial(sharded, ignored=2),
        "sharded_ghost": partial(sharded, ghost=True),
        "sharded_phase": partial(sharded, consecutive=True),
        "sharded_metric": partial(sharded, made=adam, metric="adam"),
        "metered": metered,
        "unheard": unheard,
        "flattened": flattened,
    }


def all_jobs(rank: int) -> dict[str, Any]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return {name: job(rank) for name, job in JOBS.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(all_jobs, tmp_path_factory.mktemp("options"))


def agree(found: list[dict[str, Any]], name: str) -> list[torch.Tensor]:
    one, other = (rank[name] for rank in found)
    assert "error" not in one, one
    assert all(torch.equal(p, q) for p, q in zip(one["parameters"], other["parameters"], strict=True))
    return one["parameters"]


@pytest.mark.parametrize("name", ["static_graph", "find_unused", "no_buffers", "compiled"])
def test_works_as_without_the_option(found: list[dict[str, Any]], name: str):
    """Parameters and estimates are those of DDP as it comes, which other tests compare with one process."""
    for p, q in zip(agree(found, name), agree(found, "plain"), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    columns = ["noise_trace", "grad_sq_norm", "loss", "batch_grad_norm"]
    ours, theirs = (found[0][one]["rows"][columns] for one in (name, "plain"))
    assert ((ours - theirs).abs() <= 1e-6 * theirs.abs() + 1e-9).all().all()


def test_a_static_graph_says_what_it_costs(found: list[dict[str, Any]]):
    assert any('as with sync="every"' in one for one in found[0]["static_graph"]["warnings"])


def test_compression_rounds_the_mean_and_not_what_is_measured(found: list[dict[str, Any]]):
    """tr(Sigma) is of each rank's own gradients; the mean that is stepped, and its norm, have eleven bits.

    bfloat16 is the same hook with eight, and needs NCCL.
    """
    agree(found, "fp16")
    ours, exact = (found[0][one]["rows"].iloc[0] for one in ("fp16", "plain_float"))
    # Each coordinate is rounded on its way to the sum and back.
    assert ours["batch_grad_norm"] == pytest.approx(exact["batch_grad_norm"], rel=2.0**-9)
    off = 2.0**-8 * 16 * exact["batch_grad_norm"] ** 2
    assert abs(ours["noise_trace"] - exact["noise_trace"]) <= off


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("power", "the communication hook powerSGD_hook must be one of"),
        ("delayed", "DistributedDataParallel's delay_all_reduce_named_params must not be given"),
        ("mixed_precision", "DistributedDataParallel's mixed_precision must not be given"),
        ("joined", r"ddp.join() must not be around micro_batches()"),
        ("thawed", "2 trained parameters are not synchronised"),
        ("thawed_under_way", "2 trained parameters are not synchronised"),
        ("ignored", "2 trained parameters are not synchronised"),
        ("beside", "2 trained parameters are not synchronised"),
        ("left_no_sync", "ranks hold different gradients after the window's last backward pass"),
        ("unwrapped_forward", "call the wrapped model, not model.module"),
        pytest.param("metered", "model must not be sharded for a NoiseMeter, got fully_shard", marks=sharding),
        pytest.param("unheard", "1 sharded parameters received a gradient that no hook heard", marks=sharding),
        pytest.param("flattened", "(FSDP1 is not supported)", marks=sharding),
        pytest.param("sharded_ignored", "2 trained parameters are not synchronised", marks=sharding),
        *(
            pytest.param(
                name,
                "model must not be sharded for ghost norms, consecutive gradients or Adam's metric",
                marks=sharding,
            )
            for name in ("sharded_ghost", "sharded_phase", "sharded_metric")
        ),
    ],
)
def test_is_refused_by_name_on_every_rank(found: list[dict[str, Any]], name: str, message: str):
    assert all(message in rank[name]["error"] for rank in found), found[0][name]


@pytest.mark.parametrize("name", ["left_no_sync", "unwrapped_forward"])
def test_ranks_that_were_found_apart_go_on_together(found: list[dict[str, Any]], name: str):
    one, other = (rank[name] for rank in found)
    assert one["steps"] == other["steps"] == 2
    assert all(torch.equal(p, q) for p, q in zip(one["parameters"], other["parameters"], strict=True))


def test_what_was_frozen_since_it_was_wrapped_may_thaw(found: list[dict[str, Any]]):
    agree(found, "frozen_since")


SHARDED_WRITES: dict[str, Callable[[nn.Module], object]] = {
    "zero_grad": lambda model: model.zero_grad(),
    "zeros": lambda model: model.zero_grad(set_to_none=False),
    "clip": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
    "data": lambda model: [p.grad.to_local().data.mul_(0.5) for p in model.parameters()],
}


def sharded_model(**policy: Any) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = small_model(dtype=torch.float32)
    for part in (model[0], model):
        fully_shard(part, mp_policy=MixedPrecisionPolicy(**policy))
    return model


def window_of(c: ab.BatchController, model: nn.Module, rank: int, steps: int = 2, seed: int = 0) -> None:
    for x in batches([4] * steps, seed=rank + seed, dtype=torch.float32):
        with c.micro_batch():
            c.backward(squared(model, x), weight=4)


def sharded_faults(rank: int) -> dict[str, Any]:
    """What is said of each write, within a window or in a due one, and where the window after it ends."""
    found: dict[str, Any] = {"ends": {}}
    for sync in ("last", "every"):
        for name, write in [*SHARDED_WRITES.items(), ("left", None), ("nothing", None)]:
            model = sharded_model()
            c = ab.BatchController(model, sgd(model), rule=ab.Fixed(2), sync=sync)
            if write is not None:
                window_of(c, model, rank, steps=1 if sync == "every" else 2, seed=50)
                write(model)
                try:
                    if sync == "every":
                        window_of(c, model, rank, steps=1, seed=60)
                    c.step()
                except RuntimeError as error:
                    found[name, sync] = str(error)
                else:
                    found[name, sync] = c.history.to_pandas()["applied_grad_norm"].iloc[-1]
                    continue
            elif name == "left":
                window_of(c, model, rank, steps=1, seed=50)
            c.discard_window()
            window_of(c, model, rank)
            c.step()
            found["ends"][name, sync] = [p.full_tensor().detach() for p in model.parameters()]
    for left in (False, True):
        model = sharded_model(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        c = ab.BatchController(model, sgd(model), rule=ab.Fixed(2))
        if left:
            window_of(c, model, rank, steps=1, seed=50)
            c.discard_window()
        window_of(c, model, rank)
        c.step()
        found["half", left] = [p.full_tensor().detach() for p in model.parameters()]
    return found


@sharding
def test_sharded_gradients_are_guarded_and_forgotten(tmp_path: Path):
    """A discarded window leaves nothing behind, not what fully_shard holds unsharded either."""
    for rank in spawn(sharded_faults, tmp_path):
        for name in SHARDED_WRITES:
            assert "found gradients that were changed within the window" in rank[name, "every"]
        for name in ("zero_grad", "zeros"):
            assert "gradients are gone" in rank[name, "last"]
        # Clipping a due window is what it is for.
        assert rank["clip", "last"] == pytest.approx(1e-3, rel=1e-3)
        for end in rank["ends"].values():
            for p, q in zip(end, rank["ends"]["nothing", "last"], strict=True):
                torch.testing.assert_close(p, q)
        for p, q in zip(rank["half", True], rank["half", False], strict=True):
            assert torch.equal(p, q)
