"""Ways of training that only a GPU takes as they are meant: mixed precision, compiled, fused, deterministic."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scripts.gpu_checks.numbers import step_numbers
from scripts.gpu_checks.pieces import (
    FEW_FRAMEWORKS,
    FRAMEWORKS,
    agreeing_draws,
    batch_of,
    full_fp32,
    pieces,
    relative,
    small_config,
    synchronise,
)
from scripts.gpu_checks.running import Line, Place, figure, not_run, verdict

GROUPS = ("classifier.name=group_softmax", "classifier.boundaries=[5, 10]")


class Trained(NamedTuple):
    """A short training."""

    losses: list[float]  # of each step
    weights: dict[str, Tensor]  # on the CPU
    types: dict[str, torch.dtype]  # of outputs in the last step: convolution, box head, classifier, losses
    run: Any  # the `engine.train.Run`
    seconds: float


def train_some(place: Place, name: str, *overrides: str) -> Trained:
    """Train a small detector with Balanced Group Softmax, as `jobs.train` sets it up, for a few epochs."""
    from bags.analysis.run_files import read_log
    from bags.config.load import config_to_dict
    from bags.engine.train import Run, train

    epochs = 8 if place.is_gpu else 2
    schedule = (f"train.epochs={epochs}", f"train.milestones=[{epochs - 0.5}]", "train.log_every=1")
    config = small_config(place, *GROUPS, f"name={name}", *schedule, *overrides)
    detector, loader, stats = pieces(config, sharp=False)
    detector.to(place.device).to(memory_format=torch.channels_last)
    config.run_folder.mkdir(parents=True)
    about = {"config": config_to_dict(config), "stats": stats.to_dict(), "init": None}
    run = Run(detector, config.train, config.run_folder, config.seed, config.name, about)
    types: dict[str, torch.dtype] = {}
    parts: Any = detector
    _watch(next(m for m in parts.backbone.modules() if isinstance(m, nn.Conv2d)), "convolution", types)
    _watch(parts.roi_heads.box_stages[0].box_head, "box head", types)
    detector.register_forward_hook(lambda *x: types.update({"losses": next(iter(x[2].values())).dtype}))
    synchronise(place)
    began = time.perf_counter()
    train([run], loader, torch.device(place.device))
    synchronise(place)
    seconds = time.perf_counter() - began
    losses = [float(step["loss"]) for step in read_log(config.run_folder) if step.get("loss") is not None]
    weights = {key: value.cpu() for key, value in detector.state_dict().items()}
    return Trained(losses, weights, types, run, seconds)


def _watch(module: nn.Module, name: str, types: dict[str, torch.dtype]) -> None:
    """Note the type of a module's output."""

    def note(_: nn.Module, __: tuple, output: Tensor) -> None:
        """Keep the type."""
        types[name] = output.dtype

    module.register_forward_hook(note)


def _mixed(place: Place, precision: str, expected: torch.dtype) -> Iterator[Line]:
    """Compare a training in mixed precision with one in float32."""
    plain = train_some(place, "fp32")
    mixed = train_some(place, precision, f"train.precision={precision}")
    types = {name: str(kind).removeprefix("torch.") for name, kind in mixed.types.items()}
    good = mixed.types["convolution"] == mixed.types["box head"] == expected and mixed.types["losses"] == torch.float32
    kept = all(value.dtype != expected for value in mixed.weights.values())
    yield verdict("types", good and kept, f"{types}, weights in {'float32' if kept else precision}")
    first, last = plain.losses[0], sum(mixed.losses[-4:]) / 4
    apart = abs(mixed.losses[0] - first) / first
    yield verdict("first step", apart < 0.05, f"loss {mixed.losses[0]:.4f}, in fp32 {first:.4f}", difference=apart)
    finite = all(value.isfinite().all() for value in mixed.weights.values() if value.is_floating_point())
    good = finite and len(mixed.losses) == len(plain.losses) and last < mixed.losses[0]
    text = f"loss {mixed.losses[0]:.3f} to {last:.3f} in {len(mixed.losses)} steps, in fp32 {first:.3f} to "
    yield verdict("training", good, f"{text}{sum(plain.losses[-4:]) / 4:.3f}", losses=mixed.losses)
    scaler = mixed.run.scaler
    scaled = precision == "fp16"
    words = f"loss scaling is {'on' if scaler.is_enabled() else 'off'}"
    if scaled:
        words += f", scale {scaler.get_scale():g} after training, {mixed.run.skipped} steps left out at the end"
    yield verdict("scaler", scaler.is_enabled() == scaled and (not scaled or scaler.get_scale() >= 1), words)


def bf16(place: Place) -> Iterator[Line]:
    """Training in bf16: types, first loss, falling losses."""
    yield from _mixed(place, "bf16", torch.bfloat16)


def fp16(place: Place) -> Iterator[Line]:
    """Training in fp16 with loss scaling: types, first loss, falling losses."""
    if not place.is_gpu:
        yield not_run("training", "a CPU takes seconds for each image in fp16")
        return
    yield from _mixed(place, "fp16", torch.float16)


def channels_last(place: Place) -> Iterator[Line]:
    """A step in channels-last memory, which `jobs.train` uses, against the usual order."""
    full_fp32()
    config = small_config(place, *GROUPS, "detector.framework=mask_rcnn")
    detector, loader, _ = pieces(config)
    plain = step_numbers(detector, config, loader, place.device, torch.float32, 0)
    detector = detector.to(memory_format=torch.channels_last)
    convolutions = [m for m in detector.modules() if isinstance(m, nn.Conv2d) and min(m.weight.shape[:2]) > 1]
    kept = all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)
    last = step_numbers(detector, config, loader, place.device, torch.float32, 0)
    losses = relative([plain[0][name] for name in plain[0]], [last[0][name] for name in plain[0]])
    gradients = relative(plain[1], last[1])
    text = f"relative differences: losses {losses:.1e}, gradients {gradients:.1e}"
    yield verdict("step", kept and max(losses, gradients / 10) < 1e-3, text, losses=losses, gradients=gradients)


def fused(place: Place) -> Iterator[Line]:
    """Fused SGD and AdamW: chosen where they should be, and equal to the plain ones."""
    from bags.engine.optim import build_optimizer

    for optimizer in ("sgd", "adamw"):
        for precision in ("fp32", "bf16", "fp16"):
            config = small_config(place, f"train.optimizer={optimizer}", f"train.precision={precision}").train
            layer = nn.Linear(300, 200).to(place.device)
            chosen = build_optimizer(layer, config)
            is_fused = bool(chosen.param_groups[0]["fused"])
            wanted = place.is_gpu and not (optimizer == "sgd" and precision == "fp16")
            yield verdict(f"{optimizer}, {precision}", is_fused == wanted, f"fused: {is_fused}")
        config = small_config(place, f"train.optimizer={optimizer}").train
        torch.manual_seed(0)
        layers = [nn.Linear(300, 200).to(place.device) for _ in range(2)]
        layers[1].load_state_dict(layers[0].state_dict())
        both = [build_optimizer(layer, config) for layer in layers]
        both[1].param_groups[0]["fused"] = False
        for step in range(5):
            torch.manual_seed(step)
            gradients = [torch.randn_like(p) for p in layers[0].parameters()]
            for layer, chosen in zip(layers, both, strict=True):
                for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
                    parameter.grad = gradient.clone()
                chosen.step()
        apart = relative(*(list(layer.parameters()) for layer in layers))
        yield verdict(f"{optimizer}, 5 steps", apart < 1e-6, f"relative difference to the plain one {apart:.1e}")


def compiled(place: Place) -> Iterator[Line]:
    """`train.compile` in fp32 and bf16: a graph is captured, the losses are those without it."""
    if not place.is_gpu:  # the graph without its kernels, which take a minute of a CPU
        plain: Callable = nn.Module.compile
        nn.Module.compile = lambda self: plain(self, backend="eager")  # type: ignore[method-assign, misc]
    full_fp32()
    for precision, tolerance in (("fp32", 0.02), ("bf16", 0.05)):
        eager = train_some(place, f"eager_{precision}", f"train.precision={precision}")
        torch._dynamo.utils.counters.clear()
        made = train_some(place, precision, f"train.precision={precision}", "train.compile=true")
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        apart = abs(made.losses[0] - eager.losses[0]) / eager.losses[0]
        text = f"{graphs} graphs, first loss {made.losses[0]:.4f}, without compile {eager.losses[0]:.4f}"
        text += f"; {made.seconds:.1f} s against {eager.seconds:.1f} s for {len(made.losses)} steps"
        good = graphs > 0 and apart < tolerance and made.weights.keys() == eager.weights.keys()
        yield verdict(precision, good, text, graphs=graphs, difference=apart)


def deterministic(place: Place) -> Iterator[Line]:
    """Each framework's step twice with the kernels of `--deterministic`: the same bits."""
    from bags.core.distributed import make_deterministic

    make_deterministic()
    for framework in FRAMEWORKS if place.is_gpu else FEW_FRAMEWORKS:
        config = small_config(place, *GROUPS, f"detector.framework={framework}")
        detector, loader, _ = pieces(config)
        try:
            both = [step_numbers(detector, config, loader, place.device, torch.float32, 0) for _ in range(2)]
        except RuntimeError as error:
            yield verdict(framework, False, " ".join(str(error).split())[:300])
            continue
        losses = all(torch.equal(both[0][0][name], both[1][0][name]) for name in both[0][0])
        gradients = all(map(torch.equal, both[0][1], both[1][1]))
        yield verdict(framework, losses and gradients, f"equal losses: {losses}, equal gradients: {gradients}")
    if place.is_gpu:
        yield _deformable(place)


def _deformable(place: Place) -> Line:
    """Whether deformable stages can be trained deterministically, which is only reported."""
    stages = ["detector.backbone=resnet18", "detector.deformable_stages=[4]"]
    config = small_config(place, *stages, "detector.rpn.anchor_sizes=[[8], [16], [32], [64], [128]]")
    detector, loader, _ = pieces(config)
    try:
        both = [step_numbers(detector, config, loader, place.device, torch.float32, 0)[1] for _ in range(2)]
    except RuntimeError as error:
        return figure("deformable stages", f"refused: {' '.join(str(error).split())[:200]}")
    return figure("deformable stages", f"equal gradients: {all(map(torch.equal, *both))}")


def nccl(place: Place) -> Iterator[Line]:
    """A process group of one GPU: every exchange of `core.distributed`, and a step in DistributedDataParallel."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from bags.core import distributed
    from bags.engine.optim import set_trained_part, train_mode

    full_fp32()
    device, backend = (
        torch.device("cuda", 0) if place.is_gpu else torch.device("cpu"),
        "nccl" if place.is_gpu else "gloo",
    )
    if place.is_gpu:
        torch.cuda.set_device(device)
    store = f"file://{place.folder}/group"
    dist.init_process_group(
        backend, init_method=store, rank=0, world_size=1, device_id=device if place.is_gpu else None
    )
    yield verdict("group", dist.get_backend() == backend, f"{backend}, {distributed.world_size()} rank")
    rows = torch.rand(3, 4, device=device)
    distributed.barrier()
    exchanges = {
        "gather_rows": torch.equal(distributed.gather_rows(rows), rows),
        "total": torch.equal(distributed.total(rows.clone()), rows),
        "any_rank": distributed.any_rank(rows.sum() > 0, device) and not distributed.any_rank(False, device),
        "gather_objects": distributed.gather_objects({"a": 1}) == [{"a": 1}],
        "on_main": distributed.on_main(lambda: "done") == "done",
        "average": distributed.average({"loss": rows[0, 0]})["loss"] == float(rows[0, 0]),
    }
    wrong = [name for name, good in exchanges.items() if not good]
    yield verdict("exchanges", not wrong, f"wrong: {wrong}" if wrong else ", ".join(exchanges))
    config = small_config(place, *GROUPS, "detector.framework=htc")
    detector, loader, _ = pieces(config)
    detector.to(device)
    set_trained_part(detector, "all")
    train_mode(detector)
    distributed.share_buffers(detector)
    images, targets = batch_of(config, loader, place.device, torch.float32)
    wrapped = DistributedDataParallel(detector, [device] if place.is_gpu else None)
    results = []
    for module in (detector, wrapped):
        detector.zero_grad(set_to_none=True)
        with agreeing_draws(0):
            losses = module(images, targets)
            torch.stack(list(losses.values())).sum().backward()
        synchronise(place)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in detector.parameters()]
        results.append([*losses.values(), *gradients])
    apart = relative(*results)
    yield verdict("DistributedDataParallel", apart < 1e-4, f"htc, relative difference to the plain step {apart:.1e}")
    dist.destroy_process_group()
