import os
import shutil

import pytest
import torch
from torch import nn

from codec import checkpoint
from codec.checkpoint import (
    find_checkpoint,
    load_into,
    load_state,
    load_tensors,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)


def save(run_dir, step, *, best=False, keep_last=2, value=None):
    tensors = {"model": {"w": torch.full((3,), float(step if value is None else value))}}
    return save_checkpoint(run_dir, step, tensors, {"step": step}, "a: 1\n", best=best, keep_last=keep_last)


def names(run_dir):
    return sorted(os.listdir(run_dir / "checkpoints"))


def train(net, optimizer, batches):
    for x in batches:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def make_net(seed=0, fused=False):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 2))
    return net, torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.8, 0.99), fused=fused)


def test_everything_saved_comes_back_exactly(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "model": {"a.weight": torch.randn(3, 4).T, "n": torch.tensor(7), "half": torch.randn(2).bfloat16()},
        "optimizers": {"g.0.step": torch.tensor(3.0)},
    }
    shared = tensors["model"]["a.weight"]
    tensors["model"]["tied"] = shared[0]
    state = {"step": 5, "best": 0.1 + 0.2, "worst": float("inf"), "name": "telugu"}
    path = save_checkpoint(tmp_path, 5, tensors, state, "text: തി\n", best=False, keep_last=1)
    assert load_state(path) == state and (path / "config.yaml").read_text() == "text: തി\n"
    for group, named in tensors.items():
        loaded = load_tensors(path / f"{group}.safetensors")
        assert loaded.keys() == named.keys()
        for name, value in named.items():
            assert torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype


@pytest.mark.parametrize("fused", [False, True])
def test_training_after_a_restore_equals_training_without_a_stop_to_the_bit(tmp_path, fused):
    batches = torch.randn(8, 16, 4, generator=torch.Generator().manual_seed(1))
    net, optimizer = make_net(fused=fused)
    train(net, optimizer, batches)

    first, first_optimizer = make_net(fused=fused)
    train(first, first_optimizer, batches[:4])
    tensors = {"model": first.state_dict(), "optimizers": optimizer_tensors(first_optimizer, "generator")}
    path = save_checkpoint(tmp_path, 4, tensors, {}, "", best=False, keep_last=1)

    def resume(restore):
        resumed, resumed_optimizer = make_net(seed=9, fused=fused)
        load_into(resumed, load_tensors(path / "model.safetensors"), str(path))
        restore(resumed_optimizer, load_tensors(path / "optimizers.safetensors"), "generator")
        train(resumed, resumed_optimizer, batches[4:])
        return all(torch.equal(a, b) for a, b in zip(resumed.parameters(), net.parameters(), strict=True))

    def restored_lazily(optimizer, tensors, prefix):
        map(lambda one: restore_optimizer(one, tensors, prefix), [optimizer])  # the known wrong version

    assert resume(restore_optimizer)
    assert not resume(restored_lazily)


def test_an_optimizer_that_never_stepped_restores_and_one_never_saved_does_not():
    _, optimizer = make_net()
    tensors = optimizer_tensors(optimizer, "discriminators")
    restore_optimizer(optimizer, tensors, "discriminators")
    assert optimizer.state_dict()["state"] == {}
    with pytest.raises(ValueError, match="optimizer generator: the checkpoint holds nothing, expected 6"):
        restore_optimizer(optimizer, tensors, "generator")


def test_restoring_keeps_the_learning_rate_of_the_script():
    net, optimizer = make_net()
    train(net, optimizer, torch.randn(2, 4, 4))
    tensors = optimizer_tensors(optimizer, "g")
    optimizer.param_groups[0]["lr"] = 0.5
    restore_optimizer(optimizer, tensors, "g")
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_an_optimizer_of_other_parameters_is_refused():
    net, optimizer = make_net()
    train(net, optimizer, torch.randn(2, 4, 4))
    tensors = optimizer_tensors(optimizer, "g")
    with pytest.raises(ValueError, match="holds 6 parameters, expected 2"):
        restore_optimizer(torch.optim.AdamW(nn.Linear(4, 8).parameters()), tensors, "g")
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 9), nn.Linear(9, 2))
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 has shape \[8, 4\], expected \[9, 4\]"):
        restore_optimizer(torch.optim.AdamW(other.parameters()), tensors, "g")


def test_the_last_k_and_the_best_are_kept(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, best=step == 2)
    assert names(tmp_path) == ["best", "latest", "step_00000002", "step_00000005", "step_00000006"]
    assert find_checkpoint(tmp_path).name == "step_00000006"
    assert find_checkpoint(tmp_path, "best").name == "step_00000002"


def test_a_resumed_older_run_keeps_what_it_has_just_written(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    path = save(tmp_path, 12, keep_last=1)
    assert path.is_dir() and find_checkpoint(tmp_path) == path


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 3, value=1)
    path = save(tmp_path, 3, value=2)
    assert load_tensors(path / "model.safetensors")["w"][0] == 2
    assert names(tmp_path) == ["latest", "step_00000003"]


@pytest.mark.parametrize("killed_at", range(1, 12))
def test_a_kill_at_any_rename_or_write_leaves_a_whole_checkpoint(tmp_path, monkeypatch, killed_at):
    save(tmp_path, 1)
    save(tmp_path, 2)
    calls = 0

    def dying(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == killed_at:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((os, "rename"), (os, "replace"), (checkpoint, "save_file"), (shutil, "rmtree")):
            patch.setattr(owner, name, dying(getattr(owner, name)))
        try:
            save(tmp_path, 3)
        except KeyboardInterrupt:
            pass
    found = find_checkpoint(tmp_path)
    assert load_state(found)["step"] in (2, 3)
    assert load_tensors(found / "model.safetensors")["w"][0] == load_state(found)["step"]
    save(tmp_path, 4)
    assert names(tmp_path) == ["latest", f"step_{3 if killed_at > 4 else 2:08d}", "step_00000004"]


def test_every_way_to_name_a_checkpoint_finds_it(tmp_path):
    path = save(tmp_path, 7)
    for named in (tmp_path, tmp_path / "checkpoints", path):
        assert find_checkpoint(named) == path


def test_a_pointer_to_a_removed_folder_falls_back_to_the_newest_complete_one(tmp_path):
    for step in (8, 9, 10):
        save(tmp_path, step, best=step == 10, keep_last=3)
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000010")
    (tmp_path / "checkpoints" / "step_00000009" / "state.json").unlink()
    assert find_checkpoint(tmp_path).name == "step_00000008"
    with pytest.raises(ValueError, match="has no best checkpoint; use the latest, step_00000008"):
        find_checkpoint(tmp_path, "best")


def test_what_is_no_checkpoint_is_named_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="no such checkpoint or run folder"):
        find_checkpoint(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        find_checkpoint(tmp_path)
    path = save(tmp_path, 1)
    (path / "config.yaml").unlink()
    with pytest.raises(ValueError, match="incomplete checkpoint, lacks config.yaml"):
        find_checkpoint(path)
    with pytest.raises(ValueError, match="is a file, expected the folder of a run or checkpoint"):
        find_checkpoint(path / "state.json")
    with pytest.raises(ValueError, match="no such file; the checkpoint is incomplete"):
        load_tensors(path / "discriminators.safetensors")
    (path / "state.json").write_text('{"step": ')
    with pytest.raises(ValueError, match="cannot be read"):
        load_state(path)


def test_pickles_are_refused_unread(tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "model.pt")
    for path in (tmp_path, tmp_path / "model.pt"):
        with pytest.raises(ValueError, match="model.pt: is a pickle.*safetensors only"):
            find_checkpoint(path)
    os.rename(tmp_path / "model.pt", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors: is a pickle"):
        load_tensors(tmp_path / "model.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_tensor_file_is_one_line(tmp_path, share):
    path = save(tmp_path, 1) / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="model.safetensors: truncated or not safetensors") as error:
        load_tensors(path)
    assert "\n" not in str(error.value)


def test_tensors_of_another_config_are_refused_and_the_module_left_as_it_was():
    net, _ = make_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    tensors = {name: value + 1 for name, value in net.state_dict().items()}
    tensors["extra.weight"] = torch.zeros(1)
    tensors["0.weight"] = torch.zeros(9, 4)
    del tensors["3.weight"], tensors["3.bias"]
    with pytest.raises(ValueError) as error:
        load_into(net, tensors, "runs/a")
    assert str(error.value) == (
        "runs/a: does not fit the config: 2 missing (3.weight, 3.bias); 1 unexpected (extra.weight); "
        "1 of another shape (0.weight [9, 4] instead of [8, 4]); use the run's own config, unless an older version wrote it, "
        "which this one cannot read"
    )
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
