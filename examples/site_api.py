"""The API reference of the site that `make docs` builds: every public name on one page, and pages by theme."""

import ast
import dataclasses
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("paged", "runtime", "models", "testing", "pictures")


@dataclasses.dataclass(frozen=True)
class ApiPage:
    """A page of the reference: some names of a package, in the order in which a reader meets them."""

    package: str
    title: str
    whom: str
    names: str

    @property
    def module(self) -> str:
        return "paged" if self.package == "paged" else f"paged.{self.package}"


API = {
    "paged": ApiPage(
        "paged",
        "paged: attention, batches and pages",
        "For who writes attention: what is declared, lowered and called.",
        "AttentionSpec PageLayout lower Attend RaggedBatch GroupedBatch Pages write copy_pages Plan check Explanation "
        "AttentionState merge dense_attention reference Program convert presets",
    ),
    "masks": ApiPage(
        "paged",
        "paged: masks and scores",
        "For who says which keys a query sees, and what is added to its scores.",
        "Mask Causal Window Prefix Chunk Spans Segments PerHead Tree tree Where Everything Nothing Value Given "
        "Coverage ScoreOp SoftCap ALiBi Bias",
    ),
    "schedules": ApiPage(
        "paged",
        "paged: schedules, compilers and devices",
        "For who tunes, compiles for a chip, or divides an attention over devices.",
        "Schedule XlaSchedule DecodeSchedule RaggedSchedule GpuDecodeSchedule schedules tune Timing Tuned Trial "
        "TuningFile TuningWarning compile_for Compiled Around CompileError Chip CHIPS GPU_GRAPHS "
        "Axes ShardedAttend ArraySpecs",
    ),
    "layers": ApiPage(
        "runtime",
        "paged.runtime: layers",
        "For who writes a model: attention layers, stacks of them, rotary embeddings, scales and files.",
        "PagedAttention PagedCache LayerStack convert Conversion Rotary RotaryScaling LinearScaling NtkScaling "
        "Llama3Scaling YarnScaling LongRopeScaling calibrate save load StackedState pools_of",
    ),
    "pools": ApiPage(
        "runtime",
        "paged.runtime: pools and caches",
        "For who serves by a loop of their own: which pages are free, who holds which, and what is found again.",
        "PagePool GroupedPool PrefixCache PrefixHit page_groups pages_for most_pages GroupUsage",
    ),
    "serving": ApiPage(
        "runtime",
        "paged.runtime: serving and sampling",
        "For who answers prompts and requests: `generate`, engines, drafts, and how a token is drawn.",
        "generate Generation PartialGenerations StepReport Engine Handle Event EngineStats Quantiles StepRecord "
        "Recorder TextStream NGramDraft ModelDraft commit Sampler Samplers sample draw log_probs top_log_probs",
    ),
    "models": ApiPage(
        "models",
        "paged.models",
        "For who serves released checkpoints.",
        "load save Decoder Config LayerConfig ExpertsConfig ARCHITECTURES open_checkpoint Checkpoint Weights Tensor "
        "open_safetensors open_gguf write_safetensors unpack_mxfp4 open_tokenizer Tokenizer TextStream ChatTemplate",
    ),
    "testing": ApiPage(
        "testing",
        "paged.testing: checks",
        "For who proves a mask, a kernel, a layer or a pool of pages.",
        "check_mask check_score_op check_lowering Checked check_case check_write check_layer check_model check_pool "
        "PoolMachine PoolModel CheckFailure parametrize_with_checks strategies MASK_CHECKS SCORE_CHECKS "
        "LOWERING_CHECKS KERNEL_CHECKS",
    ),
    "cases": ApiPage(
        "testing",
        "paged.testing: cases, runners and pages",
        "For who writes tests of their own around the checks.",
        "Case build Built SPECS Corner CORNERS PAST_THE_TABLE WRITES TOLERANCES ROUNDED_WEIGHTS assert_state_close "
        "RUNNERS Runner across_targets mesh_runner watched interpreted interpret_params interpret_gpu_params poison "
        "shuffle_pages assert_in_place assert_no_leak assert_pages_visited",
    ),
    "pictures": ApiPage(
        "pictures",
        "paged.pictures",
        "For who draws what an attention or an engine did.",
        "mask pages pool steps heads schedule explained Picture Page Box",
    ),
}


def names_of(package: str) -> dict[str, str | None]:
    """What a package exports, in order, and the module that each name comes from; None for a module itself.

    These are the names that its `__init__.py` imports as themselves, tables of constants included.
    """
    folder = ROOT / "paged" / ("" if package == "paged" else package)
    tree = ast.parse((folder / "__init__.py").read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    pairs = [(alias, node.module) for node in imported for alias in node.names if alias.asname == alias.name]
    found = {alias.name: module for alias, module in sorted(pairs, key=lambda pair: pair[1] is not None)}
    return {name: found[name] for name in sorted(found, key=str.lower) if not name.startswith("_")}


def names_on(page: str) -> list[str]:
    """The names on a page of the reference, in order."""
    return API[page].names.split()


def api_page(page: str) -> str:
    """A page of the reference: a line of links to its names, and a directive of mkdocstrings for each."""
    shown, sources = API[page], names_of(API[page].package)
    links, parts = [], []
    for name in names_on(page):
        # `paged.lower` is a package and the function of its name, which is what users call.
        path = f"{shown.module}.{name}.{name}" if sources[name] == name else f"{shown.module}.{name}"
        options = {"heading_level": 2, "heading": f"{shown.module}.{name}"}
        if name.isupper():  # a table, whose source would be a page
            options["show_attribute_values"] = "false"
        lines = "".join(f"      {key}: {value}\n" for key, value in options.items())
        links.append(f"[`{name}`](#{path})")
        parts.append(f"::: {path}\n    options:\n{lines}")
    return "\n".join([f"# {shown.title}\n\n{shown.whom}\n\n{', '.join(links)}\n", *parts])
