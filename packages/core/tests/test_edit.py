from __future__ import annotations

import torch

from pareto_core.edit import LocalEdit


def test_parameters_are_read_as_copies_and_written_in_place() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    edit = LocalEdit(torch.optim.Adam([parameter]))
    read = edit.get(parameter)
    assert read.dtype == torch.float32
    read += 1
    assert parameter.tolist() == [1.0, 2.0]
    storage = parameter.data_ptr()
    edit.set(parameter, read)
    assert parameter.tolist() == [2.0, 3.0]
    assert parameter.dtype == torch.bfloat16
    assert parameter.data_ptr() == storage


def test_optimizer_state() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.Adam([parameter], lr=0.0, betas=(0.9, 0.999))
    edit = LocalEdit(optimizer)
    assert edit.get_state(parameter, "exp_avg") is None
    edit.set_state(parameter, "exp_avg", torch.zeros(2))
    assert edit.get_state(parameter, "exp_avg") is None
    parameter.grad = torch.tensor([10.0, -20.0])
    optimizer.step()
    state = edit.get_state(parameter, "exp_avg")
    assert state is not None
    torch.testing.assert_close(state, torch.tensor([1.0, -2.0]))
    state.zero_()
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], torch.tensor([1.0, -2.0]))
    edit.set_state(parameter, "exp_avg", torch.tensor([5.0, 6.0]))
    assert optimizer.state[parameter]["exp_avg"].tolist() == [5.0, 6.0]
    assert edit.get_state(parameter, "momentum_buffer") is None
