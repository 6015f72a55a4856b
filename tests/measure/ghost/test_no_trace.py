"""Nothing is left behind: no hook, no copy, no memory, no wait."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from adaptbatch.measure.ghost import record
from tests.measure.ghost.twins import attached, heard, total_loss


def test_closing_leaves_no_trace():
    model, x = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), torch.randn(4, 3)
    before = [{key: copy.copy(value) for key, value in module.__dict__.items()} for module in model.modules()]
    probe = attached(model)
    assert all(layer._forward_hooks for layer in model)
    loss = total_loss(model(x))
    probe.close()
    assert [module.__dict__ for module in model.modules()] == before
    assert not any(p._backward_hooks for p in model.parameters())
    with probe.listening():
        loss.backward()
    with pytest.raises(RuntimeError, match="no layer was heard"):
        probe.take_example_sq_norms()


def test_copies_and_pickles_hear_nothing():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    probe = attached(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with probe.listening():
            total_loss(other(x)).backward()
        assert torch.equal(other(x), model(x))
        assert other(x)._backward_hooks is None
        with pytest.raises(RuntimeError, match="no layer was heard"):
            probe.take_example_sq_norms()
    assert heard(probe, total_loss(model(x))).shape == (4,)


def test_a_saved_model_needs_nothing_of_this_package(tmp_path):
    """In a process that cannot import it."""
    model, x = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), torch.randn(4, 3)
    attached(model)
    torch.save([model, x, model(x).detach()], tmp_path / "model.pt")
    script = (
        "import sys; sys.modules['adaptbatch'] = None\n"
        f"import torch; model, x, y = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "assert torch.equal(model(x), y) and model(x)._backward_hooks is None"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_a_model_is_scripted_when_its_norms_are_closed():
    model, x = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), torch.randn(4, 3)
    probe = attached(model)
    with pytest.raises(AttributeError, match=r"cannot be scripted.*controller\.close\(\) first"):
        torch.jit.script(model)
    assert heard(probe, total_loss(model(x))).shape == (4,)
    probe.close()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_checked_parameters_travel_without_a_warning():
    model = nn.Linear(3, 2)
    attached(model)
    for p in model.parameters():
        assert p._backward_hooks
        torch.utils.hooks.warn_if_has_hooks(p)


def test_a_micro_batch_of_another_size_waits_for_no_device():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    probe, before = attached(model), None
    for examples in (4, 3, 4):
        heard(probe, total_loss(model(torch.randn(examples, 3))))
        (board,) = probe._record._boards
        assert before is None or board._biases is before
        before = board._biases
    assert before.tolist() == [[True], [False]]


def calls() -> list[record.Call]:
    gc.collect()
    return [one for one in gc.get_objects() if type(one) is record.Call]


def test_nothing_is_held_longer_than_the_graph():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.randn(4, 3)
    probe = attached(model)
    output = model(x)
    assert len(calls()) == 2
    del output
    assert not calls()
    loss = total_loss(model(x))
    heard(probe, loss)
    assert len(calls()) == 2
    assert not any(call.pending for call in calls())


def test_a_layer_that_reads_what_it_changes_is_not_held_for_ever():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(4, 3)
    # Else autograd itself would hold it.
    model[1].weight.requires_grad_(False)
    attached(model)
    h = model[0](x)
    h += model[1](h)
    del h
    assert not calls()


def test_frozen_layers_hold_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2))
    attached(model)
    output = model(torch.randn(4, 3))
    assert len(calls()) == 2
    assert output.requires_grad


def test_evaluation_is_untouched():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.randn(4, 3)
    expected = model(x)
    attached(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output = model(x)
        assert torch.equal(output, expected)
        assert output._backward_hooks is None
        assert not calls()
