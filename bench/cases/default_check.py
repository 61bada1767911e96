"""The check that every operator makes of its loss: errors found, false alarms, cost.

    python -m bench.cases.default_check [--seeds 5]

Prints one table with three parts. First, models that double backward differentiates wrongly: custom
functions, and losses that detach a part of themselves. Such a model is caught if it is replaced,
refused, warned of, or differentiated as in training. Second, correct models, for which any of these
is a false alarm. Third, the time of the check in gradients, for models without custom functions and
with one in every layer.
"""

import argparse
import itertools
import time
import warnings

import torch
import torch.nn.functional as F

import fasthessian as fh
from bench.cases import problems
from fasthessian.operators import examination
from fasthessian.operators.products.function_check import RIGHT
from fasthessian.operators.products.function_guard import Functions
from tests.support import custom_models, detached, huggingface, model_zoo, models
from tests.support.custom_good import Good

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
WORDS = ("second derivative", "flags of training")  # one is in every note


def notes(make):
    """What an operator says about its derivatives when it is made; "" for nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            engine = make().engine
        except (RuntimeError, TypeError) as error:
            return str(error)
    found = [str(each.message) for each in caught if each.category is UserWarning]
    return "; ".join(found) or (engine if any(map(engine.__contains__, WORDS)) else "")


def planted(seeds):
    """Rows (wrong model and dtype, caught, tried)."""
    for name, case in custom_models.PLANTED.items():
        for dtype in DTYPES:
            if (name, dtype) == ("outside of torch", torch.bfloat16):
                continue  # NumPy has no bfloat16
            kinds = (fh.Hessian,) if case.criterion is None else (fh.Hessian, fh.GaussNewton)
            made = [custom_models.planted(name, dtype, seed)[0] for seed in range(seeds)]
            caught = [bool(notes(lambda k=kind, m=each: k(*m))) for kind in kinds for each in made]
            yield f"{name}, {str(dtype)[6:]}", sum(caught), len(caught)
    for name, dtype in itertools.product(detached.MODELS, DTYPES[:2]):
        made = [detached.made(name, always=False, dtype=dtype, seed=seed) for seed in range(seeds)]
        caught = [bool(notes(lambda m=each: fh.Hessian(*m))) for each in made]
        yield f"{name} detached in eval mode, {str(dtype)[6:]}", sum(caught), len(caught)
    for loss, dtype in itertools.product(detached.DETACHED, DTYPES[:2]):
        made = [detached.small(dtype, seed) for seed in range(seeds)]
        caught = [
            bool(notes(lambda k=kind, m=model, c=loss, d=data: k(m, c, d)))
            for kind in (fh.Hessian, fh.GaussNewton)
            for model, data in made
        ]
        yield f"{loss.__name__}, {str(dtype)[6:]}", sum(caught), len(caught)


def right(seeds):
    """Rows (set of correct models, alarms, tried)."""
    kinds = fh.Hessian, fh.GaussNewton

    def custom():
        for build in custom_models.GOOD.values():
            for dtype in DTYPES:
                for seed in range(seeds):
                    torch.manual_seed(seed)
                    model, width = build().to(dtype), 3
                    if isinstance(model, custom_models.ReluConvNet):
                        width = 64
                    x, y = torch.randn(33, width, dtype=dtype), torch.randint(3, (33,))
                    for kind in kinds:
                        yield lambda k=kind, m=model, d=(x, y): k(m, F.cross_entropy, d)

    def zoo():
        for name in model_zoo.ZOO:
            for dtype in DTYPES[:2]:
                for mode in ("eval", "train"):
                    model, criterion, (x, y) = model_zoo.zoo(name)
                    data = x.to(dtype) if x.is_floating_point() else x, y
                    made = model.to(dtype), criterion, data
                    for kind in kinds:
                        yield lambda k=kind, m=made, how=mode: k(*m, mode=how)

    def problem():
        for each in models.PROBLEMS.values():
            for dtype in DTYPES[:2]:
                yield lambda e=each, d=dtype: e.operator(*e.make(d))

    def networks():
        for made in (problems.residual(20, 8), problems.mlp(), problems.gpt()):
            for precision in (None, "bf16"):
                for kind in kinds:
                    yield lambda k=kind, m=made, p=precision: k(*m, precision=p)

    def language():
        for build in (huggingface.gpt2, huggingface.llama, huggingface.bert):
            for dtype in DTYPES:
                model, batch = huggingface.made(build)
                model.to(dtype)
                for kind in kinds:
                    yield lambda k=kind, m=model, b=batch: k(m, None, b)

    sets = {
        "good custom functions": custom,
        "layers of the tests": zoo,
        "problems of the tests": problem,
        "ResNet-20, MLP, GPT": networks,
        "Hugging Face": language,
    }
    for name, cases in sets.items():
        found = [notes(make) for make in cases()]
        yield name, [note for note in found if note], len(found)


def seconds(job, rounds=3):
    """The shortest of a few times."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        job()
        taken.append(time.perf_counter() - start)
    return min(taken)


def cost():
    """Rows (model, time of the check in gradients)."""
    for name, made in (("ResNet-20", problems.residual(20, 64)), ("GPT", problems.gpt())):
        for kind in ("as it is", "every ReLU or GELU a custom function"):
            model = made[0]
            relu, gelu = F.relu, F.gelu
            try:
                if kind != "as it is":
                    F.relu = F.gelu = lambda x, *_, **__: Good.apply(x)
                H = fh.Hessian(model, *made[1:], engine="recompute")
                gradient = seconds(H.gradient)
                checked = seconds(lambda m=model, r=made: fh.Hessian(m, *r[1:], engine="recompute"))
                held = Functions.verdict, Functions.unchecked, examination.compare_slope
                Functions.verdict = lambda self, *_: RIGHT
                Functions.unchecked = lambda self, *_, **__: []
                examination.compare_slope = lambda *_: ""
                try:
                    bare = seconds(
                        lambda m=model, r=made: fh.Hessian(m, *r[1:], engine="recompute")
                    )
                finally:
                    Functions.verdict, Functions.unchecked, examination.compare_slope = held
            finally:
                F.relu, F.gelu = relu, gelu
            yield f"{name}, {kind}", (checked - bare) / gradient


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    print("planted, caught")
    total = [0, 0]
    for name, caught, tried in planted(seeds):
        total = [total[0] + caught, total[1] + tried]
        print(f"  {name:<48} {caught:4} of {tried}", flush=True)
    print(f"  {'all':<48} {total[0]:4} of {total[1]}")
    print("right, alarms")
    for name, alarms, tried in right(seeds):
        print(f"  {name:<48} {len(alarms):4} of {tried}", flush=True)
        for note in alarms:
            print(f"    {note}")
    print("cost of the check in gradients")
    for name, gradients in cost():
        print(f"  {name:<48} {gradients:5.2f}", flush=True)


if __name__ == "__main__":
    main()
