"""stream.py: the loader is asked as a plain loop asks, and an iteration that was left does not stand in the way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import adaptbatch as ab
from tests.models import batches, sgd, small_model, squared


def controlled(steps: int) -> ab.BatchController:
    model = small_model()
    return ab.BatchController(model, sgd(model), rule=ab.Fixed(steps))


def train(c: ab.BatchController, loader: Any) -> list[int]:
    """Micro-batches of each window."""
    for x in c.micro_batches(loader):
        c.backward(squared(c.model, x), weight=len(x))
        if c.step_due:
            c.step()
    return c.history.to_pandas()["accumulation_steps"].tolist()


class Sized:
    """A loader that notes when it is asked, of ``items`` and with a ``length`` of its own."""

    def __init__(self, items: list[Any], length: int | None = None) -> None:
        self.items, self.length = items, len(items) if length is None else length
        self.log: list[str] = []

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        for index, item in enumerate(self.items):
            self.log.append(f"asked {index}")
            yield item


class TestWhenTheLoaderIsAsked:
    @pytest.mark.parametrize("steps", [1, 2, 3, 4])
    def test_where_it_has_a_length_as_in_a_plain_loop(self, steps: int):
        c, loader = controlled(steps), Sized(batches([3] * 7))
        for index, x in enumerate(c.micro_batches(loader)):
            assert loader.log[-1] == f"asked {index}"
            c.backward(squared(c.model, x), weight=3)
            if c.step_due:
                c.step()
        full, rest = divmod(7, steps)
        assert c.history.to_pandas()["accumulation_steps"].tolist() == [steps] * full + [rest] * (rest > 0)

    def test_a_buffer_that_is_used_again_is_right_with_a_length(self):
        """A loader of one reused buffer: 40 different batches, as a plain loop sees them."""
        data, buffer = torch.cat(batches([3] * 40)).reshape(40, 3, 4), torch.empty(3, 4, dtype=torch.float64)

        class Reused(Sized):
            def __iter__(self) -> Iterator[Tensor]:
                return (buffer.copy_(x) for x in data)

        ours, twin = controlled(4), controlled(4)
        assert train(ours, Reused(list(data))) == train(twin, list(data)) == [4] * 10
        columns = ["loss", "noise_trace", "grad_sq_norm", "batch_grad_norm"]
        assert ours.history.to_pandas()[columns].equals(twin.history.to_pandas()[columns])

    @pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"x": x}, lambda x: (x.numpy(), 1)])
    def test_and_refused_without_one(self, wrap):
        buffer = torch.empty(3, 4, dtype=torch.float64)
        generator = (wrap(buffer.copy_(x)) for x in batches([3] * 6))
        with pytest.raises(RuntimeError, match=r"yields one buffer again.*Yield copies, or give the loader its length"):
            next(controlled(4).micro_batches(generator))

    def test_the_same_number_twice_is_no_buffer(self):
        with pytest.warns(UserWarning, match="no item had its backward"):
            assert list(controlled(4).micro_batches(iter([0, 0, 1]))) == [0, 0, 1]

    @pytest.mark.parametrize("steps", [1, 2, 3])
    def test_a_generator_still_ends_its_last_window(self, steps: int):
        full, rest = divmod(7, steps)
        assert train(controlled(steps), iter(batches([3] * 7))) == [steps] * full + [rest] * (rest > 0)

    @pytest.mark.parametrize("sized", [False, True])
    def test_an_error_of_the_loader_loses_no_item(self, sized: bool):
        def failing() -> Iterator[Tensor]:
            yield from batches([3] * 4)
            raise OSError("disk")

        class Failing(Sized):
            def __iter__(self) -> Iterator[Tensor]:
                return failing()

        c, used = controlled(3), 0

        def epoch() -> None:
            nonlocal used
            for x in c.micro_batches(Failing([0] * 9) if sized else failing()):
                c.backward(squared(c.model, x), weight=3)
                used += 1
                if c.step_due:
                    c.step()

        with pytest.raises(OSError, match="disk"):
            epoch()
        assert used == 4
        assert "1 of 3 micro-batches" in repr(c)

    def test_a_length_that_is_none_of_batches_is_told(self):
        with pytest.warns(UserWarning, match=r"ended after 3 items, len\(loader\) is 9: .* stays open with 1 micro"):
            assert train(controlled(2), Sized(batches([3] * 3), length=9)) == [2]

    def test_more_items_than_its_length(self):
        """Nothing is lost: what comes after the promised end is a window of its own."""
        assert train(controlled(2), Sized(batches([3] * 5), length=3)) == [2, 1, 2]
        with pytest.warns(UserWarning, match=r"ended after 4 items, len\(loader\) is 3: .* stays open with 1 micro"):
            assert train(controlled(2), Sized(batches([3] * 4), length=3)) == [2, 1]

    def test_gather_for_metrics_sees_every_example_once(self):
        """Accelerate drops the last batch's padding by the loader's own end, which was reached one batch early."""
        accelerate = pytest.importorskip("accelerate")
        accelerator = accelerate.Accelerator(cpu=True)
        model = small_model(dtype=torch.float32)
        loader = DataLoader(TensorDataset(torch.randn(100, 4)), batch_size=32)
        model, optimizer, loader = accelerator.prepare(model, sgd(model), loader)
        c = ab.BatchController(model, getattr(optimizer, "optimizer", optimizer), rule=ab.Fixed(3))
        seen = []
        for (x,) in c.micro_batches(loader):
            seen.append(len(accelerator.gather_for_metrics(x)))
            c.backward(squared(model, x), weight=len(x))
            if c.step_due:
                c.step()
        assert seen == [32, 32, 32, 4]
        assert c.history.to_pandas()["accumulation_steps"].tolist() == [3, 1]


class TestStates:
    def test_at_the_end_it_is_the_loaders_own(self):
        """Not that of the last item: some loaders count their epochs."""

        class Stateful(Sized):
            epoch = 0

            def __iter__(self) -> Iterator[Any]:
                yield from super().__iter__()
                self.epoch += 1

            def state_dict(self) -> dict[str, int]:
                return {"epoch": self.epoch, "asked": len(self.log)}

        c, loader = controlled(2), Stateful(batches([3] * 3))
        for epoch in range(2):
            asked = [3 * epoch + 1 + index for index in range(3)]
            for x, count in zip(c.micro_batches(loader), asked, strict=True):
                assert c.loader_state_dict() == {"epoch": epoch, "asked": count}
                c.backward(squared(c.model, x), weight=3)
                if c.step_due:
                    c.step()
            assert c.loader_state_dict() == {"epoch": epoch + 1, "asked": 3 * epoch + 3}


class TestIterationsThatWereLeft:
    def test_an_error_in_the_body_is_told_when_the_window_goes_on(self):
        c = controlled(3)

        def epoch(fail_at: int) -> None:
            for index, x in enumerate(c.micro_batches(batches([3] * 4))):
                c.backward(squared(c.model, x), weight=3)
                if index == fail_at:
                    raise KeyboardInterrupt
                if c.step_due:
                    c.step()

        with pytest.raises(KeyboardInterrupt):
            epoch(fail_at=1)
        with pytest.warns(UserWarning, match=r"goes on with the 2 micro-batches that it holds; discard_window\(\)"):
            epoch(fail_at=9)
        assert c.history.to_pandas()["accumulation_steps"].tolist() == [3, 3]

    def test_after_discard_window_there_is_nothing_to_tell(self):
        c = controlled(3)
        for x in c.micro_batches(batches([3] * 4)):
            c.backward(squared(c.model, x), weight=3)
            break
        c.discard_window()
        assert train(c, batches([3] * 3)) == [3]

    @pytest.mark.parametrize("discard", [False, True])
    def test_one_that_a_traceback_holds_does_not_block_the_next(self, discard: bool):
        c, kept = controlled(2), None

        def epoch() -> None:
            for _ in c.micro_batches(batches([3, 3])):
                raise ValueError("of the user")

        try:
            epoch()
        except ValueError:
            kept = sys.exc_info()
        assert kept is not None
        if discard:
            c.discard_window()
        assert train(c, batches([3] * 4)) == [2, 2]

    def test_a_micro_batch_may_be_tried_again_after_its_window_was_discarded(self):
        c = controlled(1)
        for x in c.micro_batches(batches([3, 3])):
            c.backward(squared(c.model, x), weight=3)
            c.discard_window()
            c.backward(squared(c.model, x), weight=3)
            c.step()
        assert len(c.history) == 2


def test_arrays_are_known_by_their_memory():
    buffer = np.zeros((3, 4))
    generator = (np.copyto(buffer, x) or buffer for x in np.arange(24.0).reshape(2, 3, 4))
    with pytest.raises(RuntimeError, match="yields one buffer again"):
        next(controlled(4).micro_batches(generator))
