"""What a window costs: reads of the host and memory, counted by the study of overhead."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import adaptbatch as ab
from studies.questions.overhead import Allocations, HostReads
from tests.models import batches, run, small_model


def test_one_host_read_a_window():
    model = small_model(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = ab.BatchController(model, optimizer, rule=ab.RelativeStandardError())
    # As on a GPU: what the CPU looks at right away waits for the window's one read.
    controller._accumulator.suspicion.reads_now = False
    data = batches([3, 3], dtype=torch.float32)
    run(controller, data)
    with HostReads() as reads:
        for _ in range(5):
            run(controller, data)
    assert reads.count == 5


def test_the_counter_counts():
    x = torch.ones(3, requires_grad=True)

    def read(grad: Tensor) -> None:
        grad.sum().item()

    x.register_hook(read)
    with HostReads() as reads:
        x.sum().item()
        x.tolist()
        bool((x > 0).all())
        x.sum().backward()
    assert reads.count == 4


def test_no_buffer_of_a_parameters_size():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 400))
    x = [torch.randn(4, 400) for _ in range(4)]

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Allocations() as plain:
        for micro in x:
            loss(model, micro).backward()
        torch._foreach_div_([p.grad for p in model.parameters()], 4.0)
        optimizer.step()
        optimizer.zero_grad()
    controller = ab.BatchController(model, optimizer, rule=ab.Fixed(4))
    with Allocations() as ours:
        run(controller, x, loss)
    assert ours.large.get(400 * 400 * 4, 0) == plain.large[400 * 400 * 4]
    assert ours.total - plain.total < 0.05 * 400 * 400 * 4
