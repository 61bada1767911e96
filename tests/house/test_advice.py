"""Every piece of advice in a message of the package has a test that follows the advice.

The source is searched for texts with advice. Each text must contain the words of at least one row.
Rows are in ``FOLLOWED``, and in advice_of_operators.py and advice_of_results.py of tests/support,
whose cases test_advice_works.py runs. New advice needs a new row. A row of ``FOLLOWED`` has words
of the text in the source, without values in braces, and the test that follows the advice, as
"file::function".
"""

import ast
import re
from pathlib import Path

import pytest

import fasthessian
from tests.support.advice_of_operators import CASES as OPERATORS
from tests.support.advice_of_results import CASES as RESULTS

ROOT = Path(fasthessian.__file__).parent
TESTS = {path.name: path for path in Path(__file__).parents[1].rglob("test_*.py")}
# The drop-in has its own list of advice. app/advice.py translates advice.
ELSEWHERE = ("pyhessian/", "app/advice.py")

VERBS = (
    "ask|call|check|choose|convert|draw|fix|give|install|leave|let|make|move|pass|pip install|put|"
    "raise|reinstall|return|save|set|split|take|try|unset|update|use|wrap|write"
)
ADVICE = re.compile(
    rf"(?:^|[;:,?(] |\b(?:or|and|else|then|folder) )(?:{VERBS})\b(?! is\b| are\b)"
    r"|\b(?:basis|check|engine|microbatch|mode|overwrite|reduction)=(?:'\w+'|None|True|False)"
    r"|\bway out\b|\bwould fit\b|\bmore cut the batches\b|\.(?:contiguous|to)\(\)"
)

MEMORY = "test_advice_works.py::test_a_basis_that_does_not_fit"
FOLDER = "test_cli_options.py::test_the_advice_about_a_folder_works"
SAVING = "test_saving.py::test_the_advice_about_checkpoints_works"
PLAN = "test_plan.py::test_the_advice_of_an_error_works"
NOTE = "test_plan.py::test_the_advice_of_a_note_works"
INSTALLED = "test_advice.py::test_no_message_asks_to_install_an_installed_package"
REFUSED = "test_fsdp_limits.py::test_what_is_not_supported_is_refused_in_one_line"
EXTENDED = "test_fsdp_limits.py::test_offloaded_and_extended_parameters_are_refused"
GROUPS = "test_bad_groups.py::"
FOLLOWED = {
    "; use 'whole', or pass the data as several batches":
        "test_per_batch.py::test_an_operator_without_several_batches_is_refused_in_one_line",
    "make the same call with the same model":
        "test_consistency.py::test_a_rank_that_differs_is_named_on_all_ranks",
    "copy those of rank 0: ": "test_consistency.py::test_the_tensors_of_rank_0_can_be_copied",
    "; make the operator only on the ranks":
        "test_unlike_ranks.py::"
        "test_groups_may_overlap_or_have_one_rank_and_a_destroyed_one_is_refused",
    "which other ranks need, ":
        "test_unlike_ranks.py::"
        "test_a_loss_that_is_another_one_in_the_mode_of_other_ranks_is_refused",
    "first and pass torch.distributed":
        GROUPS + "test_a_group_needs_an_initialised_process_group",
    "analyses its own data alone; ": GROUPS + "test_a_run_of_torchrun_without_a_group_is_warned_of",
    "pass one of them: mesh[name]": GROUPS + "test_a_group_is_a_process_group_or_a_mesh",
    "; use group=torch.distributed.group.WORLD":
        GROUPS + "test_a_group_is_a_process_group_or_a_mesh",
    "() and build a new operator": GROUPS + "test_a_group_that_was_destroyed_needs_a_new_operator",
    "divide the model by ": GROUPS + "test_fsdp1_is_refused",
    "pass the torch.nn.Module that was split": GROUPS + "test_a_stage_of_a_pipeline_is_refused",
    "pass its operators one by one":
        GROUPS + "test_sharded_needs_a_group_and_a_single_operator",
    "make the operator with group=":
        GROUPS + "test_sharded_needs_a_group_and_a_single_operator",
    "it out to start from a random vector": "test_start.py::test_a_start_that_is_refused",
    "or model.module if that is meant": GROUPS + "test_a_distributed_model_needs_a_group",
    "; pass the group to both":
        GROUPS + "test_a_sampler_for_another_number_of_ranks_is_refused",
    "set a longer timeout: ": GROUPS + "test_a_busy_rank_needs_a_longer_timeout",
    "pass a criterion, or mode='train'":
        "test_detectors.py::test_a_model_with_a_loss_only_in_training_is_refused_in_eval_mode",
    "closure frees its graph":
        "test_closure_loss.py::test_a_closure_that_clears_gradients_leaves_them_as_they_were",
    "closure writes into ":
        "test_closure_loss.py::test_a_closure_that_writes_into_a_tensor_is_warned_of_and_the_advice_works",
    "engine='difference' needs first ones only":
        "test_workarounds.py::test_a_function_without_a_workaround_names_an_engine_that_works",
    "; pass smaller batches":
        "test_checks_that_do_not_apply.py::test_a_batch_that_cannot_be_cut_into_microbatches_is_refused",
    "does not serve, a part of batch":
        "test_checks_that_do_not_apply.py::test_a_batch_that_cannot_be_cut_into_microbatches_is_refused",
    "return torch.view_as_real(outputs)": "test_complex_parameters.py::test_complex_outputs",
    "with sigma=": "test_compressed.py::test_a_density_finer_than_float16_resolves_says_so",
    "or basis='none' needs ": MEMORY,
    "basis='compressed' needs ": MEMORY,
    " would fit (fewer steps or pairs, or a smaller ncv)": MEMORY,
    "use a machine with more memory": MEMORY,
    "basis='offload' needs ": "test_machines.py::test_options_that_would_fit_on_a_gpu_or_its_host",
    "call fully_shard with one mesh": REFUSED,
    "use group=None": REFUSED,
    "call fully_shard without it": EXTENDED,
    "call fully_shard on parameters": EXTENDED,
    "pass group=torch.distributed.new_group(":
        "test_fsdp_limits.py::test_a_mesh_of_two_dimensions_over_some_ranks_needs_a_group",
    "; pip install 'fasthessian[cli]'": INSTALLED,
    "figures need matplotlib; pip install matplotlib": INSTALLED,
    "; give a folder of images, or digits": "test_images.py::test_the_digits_need_no_folder",
    "; use the same or another folder":
        "test_train_run.py::test_other_settings_are_refused_and_another_folder_works",
    "variant {} does not exist; use ":
        "test_recipes.py::test_a_variant_that_does_not_exist_is_refused_with_those_that_do",
    "a checkpoint needs safetensors; pip install": INSTALLED,
    " alone; pass checkpoint='run.fh'":
        "test_keeper.py::test_a_limit_of_time_ends_a_call_before_the_product_that_would_exceed_it",
    "no save was completed; call the algorithm":
        "test_refused_checkpoints.py::test_a_call_that_was_killed_before_its_first_save_is_made_again",
    "no checkpoint that is whole":
        "test_refused_checkpoints.py::test_a_checkpoint_that_cannot_be_read_is_deleted",
    "the report needs jinja2; pip install jinja2": INSTALLED,
    "which is missing; pip install scikit-learn": INSTALLED,
    "nvcc on PATH": INSTALLED,
    "install a C++17 compiler, then reinstall ": INSTALLED,
    "Triton is not installed; pip install triton": INSTALLED,
    "; pip install -U triton": "test_machines.py::test_the_version_of_triton",
    "); reinstall it": "test_machines.py::test_a_private_build_of_triton_is_accepted",
    "and finds none; put gcc on PATH": "test_machines.py::test_triton_needs_a_c_compiler",
    "serves CPU tensors only; unset it":
        "test_advice.py::test_the_advice_to_unset_the_interpreter_works",
    ", update fasthessian": "test_result_files.py::test_the_undamaged_result_is_drawn",
    " is a folder; give ": "test_result_files.py::test_a_folder_is_not_a_result_but_may_hold_one",
    "draw them with: ": "test_delivery.py::test_numbers_are_written_before_anything_is_drawn",
    "use another engine": "test_advice_of_checks.py::test_a_check_that_advises_another_engine",
    "try another engine": "test_advice_of_checks.py::test_a_check_that_advises_another_engine",
    "fix its random numbers":
        "test_advice_of_checks.py::test_a_check_that_advises_to_fix_random_numbers",
    "try mode='train'":
        "test_advice_of_checks.py::test_a_check_of_a_model_that_detaches_in_eval_mode",
    "pass weights=, or samples are":
        "test_advice_of_checks.py::test_a_check_of_samples_that_are_coupled",
    "pass weights=lambda batch: <its number of terms>":
        "test_loss_terms.py::test_single_samples_of_an_opaque_loss_ask_for_weights",
    "engine='recompute' keeps no graph":
        "test_advice_of_checks.py::test_out_of_memory_advises_smaller_parts_or_no_graphs",
    " and more cut the batches":
        "test_advice_of_checks.py::test_out_of_memory_advises_smaller_parts_or_no_graphs",
    "use Hessian, or a criterion of torch's operations":
        "test_advice_of_checks.py::test_gauss_newton_of_an_unknown_function_in_the_loss_of_an_output_object",
    "use its sum, of which each sample has its own":
        "test_advice.py::test_an_empirical_fisher_of_uneven_samples",
    "use --overwrite or another --out": FOLDER,
    "choose another --out": FOLDER,
    "ask for --top, --bottom, --trace or --density":
        "test_cli_options.py::test_the_advice_of_a_plan_works",
    "give --top 1 or more, or ": "test_cli_options.py::test_the_advice_of_a_plan_works",
    "or module:function of your own": "test_cli_options.py::test_the_advice_about_a_problem_works",
    "from its folder write ": "test_cli_options.py::test_the_advice_about_a_problem_works",
    "use a smaller learning rate": "test_cli_options.py::test_the_advice_of_an_error_works",
    "steps; use a smaller rate":
        "test_stability.py::test_a_descent_that_diverges_is_refused_and_a_smaller_rate_works",
    "takes no --data; use resnet20": "test_cli.py::test_resnet20_on_a_cifar_folder",
    "give the unpacked CIFAR folder": "test_cli.py::test_resnet20_on_a_cifar_folder",
    " both say how long a product takes; give one": PLAN,
    "--flops needs the samples of a product; give --samples": PLAN,
    "give --flops as well, or --machine h100": PLAN,
    " ranks per node; use --ranks ": PLAN,
    "but the machine has no GPU; use --basis compressed": PLAN,
    "use --basis compressed, or --pairs 0": PLAN,
    "use --wrap plain, or raise --ranks": PLAN,
    " is not known; give --": NOTE,
    "are not counted; give --activation-memory": NOTE,
    "and --resume goes on; give one": SAVING,
    "needs a folder to save to; give --checkpoint DIR": SAVING,
    "; give the options of the first call": SAVING,
    "as torchrun does; start with torchrun, or unset":
        "test_launch.py::test_missing_variables_are_named",
    " has no GPU, this machine has ": "test_launch.py::test_more_ranks_than_gpus_are_refused",
    "leave the backend to fasthessian.distributed.init()":
        "test_launch.py::test_doctor_names_what_hinders_gpus",
    "cannot be used ({}); leave it out":
        "test_study.py::test_a_device_that_cannot_be_used_is_left_out",
    "is too short{} and is saved as a whole; give ": "test_carry_out.py::test_the_limit_of_time",
    "is not empty and holds no study, but ":
        "test_store.py::test_a_folder_of_something_else_is_refused",
    "out: {} is damaged ({}); choose another folder":
        "test_store.py::test_damaged_settings_are_refused",
    "holds a study with other settings: ":
        "test_store.py::test_the_folder_of_another_study_is_refused_and_stays_as_it_is",
    "take: basis=": "test_plan.py::test_nothing_fits",
    "ask the scheduler for: ": "test_plan.py::test_the_tables_show_the_numbers",
}  # fmt: skip
CASES = {**OPERATORS, **RESULTS}


def texts(tree):
    """The constant texts and f-strings, with {} for values; no docstrings, no decorators."""
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            if isinstance(node.body[0], ast.Expr):
                skipped.add(node.body[0].value)
            for decorator in getattr(node, "decorator_list", ()):
                skipped.update(ast.walk(decorator))
        elif isinstance(node, ast.JoinedStr):
            skipped.update(set(ast.walk(node)) - {node})
    for node in set(ast.walk(tree)) - skipped:
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def advice(source):
    """The line and the text of each piece of advice in a module's source."""
    found = (
        (line, text) for line, text in texts(ast.parse(source))
        if " " in text and "\n" not in text and ADVICE.search(text)
    )  # fmt: skip
    return sorted(found)


def all_advice():
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(ELSEWHERE):
            yield from ((f"{name}:{line}", text) for line, text in advice(path.read_text()))


def test_every_piece_of_advice_has_a_test():
    rows = {**CASES, **FOLLOWED}
    missing = [f"{at}: {said}" for at, said in all_advice() if not any(row in said for row in rows)]
    assert not missing, "advice without a row in tests/house/test_advice.py:\n" + "\n".join(missing)


def test_every_row_belongs_to_a_message():
    said = [text for path in ROOT.rglob("*.py") for _, text in texts(ast.parse(path.read_text()))]
    stale = [row for row in {**CASES, **FOLLOWED} if not any(row in text for text in said)]
    assert not stale, f"no message of the package holds these words any more: {stale}"


def test_every_named_test_exists():
    for row, place in FOLLOWED.items():
        name, _, function = place.partition("::")
        tree = ast.parse(TESTS[name].read_text())
        assert any(isinstance(n, ast.FunctionDef) and n.name == function for n in tree.body), row


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("raise ValueError(f'n={n} is odd; use {n + 1}')", "n={} is odd; use {}"),
        ("way = 'raise max_matvecs or tol'", "raise max_matvecs or tol"),
        ("ways.append(f\"basis='{name}' needs room, or engine='recompute'\")",
         "basis='{}' needs room, or engine='recompute'"),
        ("def f():\n    'Use it, or pass x.'\n    raise ValueError('the use is unclear')", None),
    ],
)  # fmt: skip
def test_advice_is_distinguished_from_other_texts(source, found):
    assert [text for _, text in advice(source)] == ([found] if found else [])


def test_no_message_asks_to_install_an_installed_package():
    """If a package or compiler is installed, no message asks to install it."""
    from fasthessian import kernels
    from fasthessian.results import plots
    from fasthessian.study import data

    plots.figure()
    assert len(data.digits(size=8, channels=1, seed=0).train_y) > 1000
    for name, module in kernels.BACKENDS.items():
        assert "install" not in (module.unavailable("cpu") or ""), name


def test_the_advice_to_unset_the_interpreter_works(monkeypatch):
    import torch

    from fasthessian.kernels.triton import backend as triton_backend

    monkeypatch.delitem(__import__("sys").modules, "fasthessian.kernels.triton.rows", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_backend, "_cannot_compile", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "unset it" in triton_backend.unavailable("cuda")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert triton_backend.unavailable("cuda") is None


def test_an_empirical_fisher_of_uneven_samples():
    import torch

    x, y = torch.randn(6, 3), torch.randn(6, 2)
    y[0, 1] = y[3] = float("nan")

    def known(z, y):
        return (z - y)[~y.isnan()].square()

    model = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match="use its sum, of which each sample has its own"):
        fasthessian.EmpiricalFisher(model, lambda z, y: known(z, y).mean(), (x, y))
    A = fasthessian.EmpiricalFisher(model, lambda z, y: known(z, y).sum(), (x, y))
    assert (A @ torch.ones(A.n)).any()
