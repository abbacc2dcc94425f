"""What commands share: user errors, and the options of model, rule and decode."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from safetensors import SafetensorError

import fdpp
from fdpp import tiny
from fdpp.decoding.refresh import ALL, Refresh
from fdpp.decoding.settings import BRANCHES, CACHES, HEADS, REMASKINGS, DiffusionGenerationConfig
from fdpp.models.families import family_of
from fdpp.models.quantised import KINDS, check_kind, method_of, quantise
from fdpp.rules.rule import Number

if TYPE_CHECKING:
    from fdpp.models.language_model import DiffusionLM

LOADING = (OSError, ValueError, RuntimeError, SafetensorError)
"""What loading a checkpoint raises where its files are not what they should be."""

LENGTH = 128
"""Default length of a response, where the model is no embedded one."""


class CommandError(Exception):
    """Something the user can put right; shown as one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)")


@contextmanager
def reported(*errors: type[Exception], about: str = "") -> Iterator[None]:
    """Turn `errors` into a `CommandError` of one line."""
    try:
        yield
    except errors as error:
        raise CommandError(about + shorten(str(error), 300, placeholder=" ...")) from error


def whole(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """An argument type: an int from `low` to `high`."""

    def parse(text: str) -> int:
        with suppress(ValueError):
            if low <= int(text) <= high:
                return int(text)
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {low}, got {text!r}")

    return parse


def model_name(text: str) -> str:
    """An argument type: what `--model` takes; refuses an embedded model that does not exist."""
    try:
        tiny.task_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def drafts(text: str) -> int | str:
    """An argument type: "auto" or an int of at least 1."""
    return text if text == "auto" else whole(1)(text)


def refresh(text: str) -> Refresh:
    """An argument type: what `--refresh` takes."""
    try:
        return Refresh.of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def check_output(option: str, path: Path) -> None:
    """Refuse a file that cannot be written before the work that is to fill it; leaves no file behind."""
    if path.is_dir():
        raise CommandError(f"{option} {path}: a folder, expected a file")
    if not path.parent.is_dir():
        raise CommandError(f"{option} {path}: no such folder as {path.parent}")
    existed = path.exists()
    with reported(OSError, about=f"{option}: "):
        path.open("a").close()
        if not existed:
            path.unlink()


def add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    names = ", ".join(f"tiny:{task}" for task in tiny.MODELS)
    kinds = "LLaDA, Dream, SDAR, LLaDA2 or Fast-dLLM v2"
    text = f"folder or Hugging Face id of a {kinds}; {names}: the small ones in this package (default: tiny, "
    add("--model", type=model_name, default="tiny", metavar="PATH_OR_ID", help=text + "which is tiny:sums)")
    text = "folder or Hugging Face id of a peft adapter for it, such as a LoRA, merged into its weights (needs peft)"
    add("--adapter", metavar="PATH_OR_ID", help=text)
    text = (
        "quantise the weights of the blocks once they are loaded (needs torchao): int8, float8 and int4 the weights "
        "alone, which saves memory; int8-dynamic and float8-dynamic (GPUs from compute capability 8.9) also what they "
        "are multiplied with; int4 costs the most quality"
    )
    add("--quantize", choices=KINDS, help=text)
    text = "auto: a GPU if there is one (default: auto)"
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help=text)
    text = "auto: bfloat16 on a GPU, float32 on a CPU (default: auto)"
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help=text)


def option_of(field: str, number: Number) -> str:
    """The attribute of the parsed arguments for a rule's field; the option is the same with dashes."""
    return number.option or field


def rule_options() -> dict[str, list[tuple[type[fdpp.Rule], str]]]:
    """The options that the rules take, each with the rules and fields that it sets."""
    found: dict[str, list[tuple[type[fdpp.Rule], str]]] = {}
    for rule in fdpp.Rule.named().values():
        for field, number in rule.numbers.items():
            found.setdefault(option_of(field, number), []).append((rule, field))
    return found


def add_rule_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("rule: which predictions of a forward are committed together").add_argument
    rules = fdpp.Rule.named()
    presets = fdpp.Rule.presets
    text = "; ".join(f"{name}: {rule.about}" for name, rule in rules.items())
    text += "; " + "; ".join(f"{name}: {rule.label()}" for name, rule in presets.items())
    choices = (*presets, *rules)
    add("--rule", choices=choices, default="frechet", help=f"{text} (default: frechet)".replace("é", "e"))
    for option, takers in rule_options().items():
        rule, field = takers[0]
        number = rule.numbers[field]
        names = ", ".join(str(taker.name) for taker, _ in takers)
        about = f"{names}: {number.about}{defaults_of(takers)}"
        kind = whole(int(number.interval)) if number.whole else float
        add(f"--{option.replace('_', '-')}", type=kind, metavar=number.unit, help=about)
    text = f"the rule that {fdpp.Revocable.name} takes tokens back of (default: frechet)"
    add("--of", choices=[*presets, *(name for name, rule in rules.items() if fdpp.Revocable.may_wrap(rule))], help=text)
    text = "rules with a --k, and origin: steps for the whole answer (default: one per token)"
    add("--steps", type=whole(1), metavar="N", help=text)


def defaults_of(takers: list[tuple[type[fdpp.Rule], str]]) -> str:
    """What --help says of an option's defaults: the first rule's, and others' that differ."""
    (_, first), *others = ((str(rule.name), getattr(rule, field)) for rule, field in takers)
    if first is None:
        return ""
    return f" (default: {first:g}{''.join(f', {name}: {own:g}' for name, own in others if own not in (first, None))})"


def add_decoding_options(parser: argparse.ArgumentParser, length: str = f"{LENGTH}, or the embedded model's") -> None:
    """`length`: what --help says of the default length."""
    add = parser.add_argument_group("decoding").add_argument
    add("--gen-length", type=whole(1), metavar="N", help=f"longest answer in tokens (default: {length})")
    text = (
        "tokens per block, 1 to 1024; blocks are decoded in turn (default: the model's own: 32 of LLaDA and Dream, of "
        "a block-diffusion model those that it was trained with)"
    )
    add("--block-length", type=whole(1), metavar="N", help=text)
    text = "block-diffusion models: tokens of a block that are decided together (default: the model's own)"
    add("--sub-block-length", type=whole(1), metavar="N", help=text)
    text = (
        "what a block's forwards reuse: none: nothing; prefix: what is before the block; dual: also what is after it, "
        "the fastest; of a block-diffusion model prefix feeds the block, dual the sub-block (default: %(default)s)"
    )
    add("--cache", choices=CACHES, default="dual", help=text)
    text = (
        "what a block's first forward feeds under a cache: all: everything; recent: the block before and the block; "
        "recent:N: so, and everything every N blocks; block: the block alone, which loses answers; "
        "window:BEFORE:AFTER: so many tokens beside the block, or start and end; not of block-diffusion models "
        "(default: all)"
    )
    add("--refresh", type=refresh, default=ALL, metavar="WHAT", help=text)
    text = "states a forward evaluates: 1: no drafts; more, or auto: same answer in fewer forwards (default: 1)"
    add("--drafts", type=drafts, default=1, metavar="N", help=text)
    text = "batch: a row for each of these states; tree: one row under a mask (default: %(default)s)"
    add("--branches", choices=BRANCHES, default="batch", help=text)
    text = (
        "fused: keep no logits, which saves memory and may be slower; auto: fused where that was measured to be faster "
        "(default: %(default)s)"
    )
    add("--head", choices=HEADS, default="library", help=text)
    text = "0: the most likely tokens; above 0: sampled, more randomly the higher (default: 0)"
    add("--temperature", type=float, default=0.0, metavar="T", help=text)
    add("--top-k", type=whole(0), metavar="K", help="only the K most likely tokens of a position; 0: all (default: 0)")
    text = "only the most likely tokens that hold this much of the probability, 0 to 1 (default: 1)"
    add("--top-p", type=float, metavar="P", help=text)
    text = "only tokens at least this often as likely as the most likely one, 0 to 1 (default: 0)"
    add("--min-p", type=float, metavar="P", help=text)
    text = "above 1: tokens that a position's context holds are less likely (default: 1)"
    add("--repetition-penalty", type=float, metavar="R", help=text)
    text = "never propose the token with this id; may be given several times"
    add("--suppress-token", type=whole(0), action="append", metavar="ID", dest="suppress_tokens", help=text)
    text = (
        "never complete this word, the ids of its tokens; may be given several times, as in --bad-word 5 --bad-word 7 9"
    )
    add("--bad-word", type=whole(0), action="append", nargs="+", metavar="ID", dest="bad_words_ids", help=text)
    add("--seed", type=whole(0), default=0, metavar="N", help="same seed, same samples (default: 0)")
    text = "quota: commit the most confident tokens, or random ones (default: %(default)s)"
    add("--remasking", choices=REMASKINGS, default="low_confidence", help=text)
    text = "scale of classifier-free guidance, 0 or more; above 0 a forward is twice the work (default: 0)"
    add("--cfg-scale", type=float, default=0.0, metavar="S", help=text)
    add("--logits-eos-inf", action="store_true", help="never propose the end-of-text token")
    text = "commit the end-of-text and end-of-turn tokens after all others"
    add("--confidence-eos-eot-inf", action="store_true", help=text)
    text = "go on to --gen-length after the end-of-text token, and print what follows it"
    add("--no-stop-at-eos", action="store_true", help=text)


def add_stop_option(parser: argparse.ArgumentParser) -> None:
    text = "end the answer before this text; may be given several times, and for a line end as $'\\n'"
    parser.add_argument("--stop-string", action="append", metavar="TEXT", help=text)


def rule_of(args: argparse.Namespace) -> fdpp.Rule:
    """The rule that the options name."""
    if args.rule != fdpp.Revocable.name:
        if args.of is not None:
            raise CommandError(f"--of does not belong to --rule {args.rule}, but to --rule {fdpp.Revocable.name}")
        return named(args, args.rule)
    own = {option_of(field, number): field for field, number in fdpp.Revocable.numbers.items()}
    given = {field: getattr(args, option) for option, field in own.items() if getattr(args, option) is not None}
    with reported(ValueError):
        return fdpp.Revocable(named(args, args.of or "frechet", set(own)), **given)


def named(args: argparse.Namespace, name: str, others: Set[str] = frozenset()) -> fdpp.Rule:
    """The rule `name` with the numbers that the options give; `others` are options that are not for it."""
    kind = fdpp.Rule.named().get(name)
    options = {} if kind is None else {option_of(field, number): field for field, number in kind.numbers.items()}
    # With --steps, what may be left to a schedule is.
    free = {} if kind is None else {field: None for field, number in kind.numbers.items() if number.optional}
    own = {*options, "steps"} if kind is not None and kind(**free).takes_steps() else {*options}
    for option in ("steps", *rule_options()):
        if option not in own and option not in others and getattr(args, option) is not None:
            takes = " and ".join(f"--{taken.replace('_', '-')}" for taken in sorted(own)) or "no number"
            raise CommandError(f"--{option.replace('_', '-')} does not belong to --rule {name}, which takes {takes}")
    given: dict[str, Any] = {} if args.steps is None else free
    given |= {field: getattr(args, option) for option, field in options.items() if getattr(args, option) is not None}
    with reported(ValueError):
        return fdpp.Rule.presets[name] if kind is None else kind(**given)


def config_of(args: argparse.Namespace) -> DiffusionGenerationConfig:
    """The settings that the options give; lengths that none gives are the embedded model's own, else 128 and None."""
    rule, task = rule_of(args), tiny.task_of(args.model)
    length, block = (LENGTH, None) if task is None else (task.max_new_tokens, task.block_length)
    with reported(ValueError):
        return DiffusionGenerationConfig(
            max_new_tokens=args.gen_length or length,
            block_length=args.block_length or block,
            sub_block_length=args.sub_block_length,
            rule=rule,
            steps=args.steps,
            cache=args.cache,
            refresh=args.refresh,
            stop_at_eos=not args.no_stop_at_eos,
            drafts=args.drafts,
            branches=args.branches,
            head=args.head,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            bad_words_ids=args.bad_words_ids,
            suppress_tokens=args.suppress_tokens,
            stop_strings=getattr(args, "stop_string", None),
            seed=args.seed,
            remasking=args.remasking,
            cfg_scale=args.cfg_scale,
            logits_eos_inf=args.logits_eos_inf,
            confidence_eos_eot_inf=args.confidence_eos_eot_inf,
        )


def load_model(args: argparse.Namespace) -> tuple[DiffusionLM, Any]:
    """Model and tokenizer, on the device and in the dtype that the options name."""
    import transformers

    from fdpp.models.adapters import adapter_config, merge_adapter

    if args.device == "cuda" and not torch.cuda.is_available():
        raise CommandError(f"--device cuda: torch {torch.__version__} sees no CUDA device here")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    name = ("bfloat16" if device == "cuda" else "float32") if args.dtype == "auto" else args.dtype
    if args.quantize is not None:
        with reported(ImportError, ValueError, about=f"--quantize {args.quantize}: "):
            check_kind(args.quantize, torch.device(device), getattr(torch, name))
    transformers.logging.set_verbosity_error()
    if tiny.task_of(args.model) is not None or not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    if args.adapter is not None:
        check_place("--adapter", args.adapter, "an adapter")
        with reported(ImportError, OSError, ValueError, about=f"--adapter {args.adapter}: "):
            adapter_config(args.adapter)
    model, tokenizer = load_base(args, getattr(torch, name))
    if args.adapter is not None:
        with reported(*LOADING, about=f"--adapter {args.adapter}: "):
            model = merge_adapter(model, args.adapter)
    if args.quantize is not None:
        with reported(*LOADING, about=f"--quantize {args.quantize}: "):
            model = quantise(model, args.quantize, torch.device(device))
    return model.to(device), tokenizer


def load_base(args: argparse.Namespace, dtype: torch.dtype) -> tuple[DiffusionLM, Any]:
    """Model and tokenizer that `--model` names."""
    import transformers

    about = f"--model {args.model}: "
    with reported(*LOADING, about=about):
        task = tiny.task_of(args.model)
        if task is not None:
            model, tokenizer = tiny.load(task.name)
            return model.to(dtype), tokenizer
        check_place("--model", args.model, "a model")
        config = transformers.PretrainedConfig.get_config_dict(args.model)[0]
        family, quantised = family_of(config), config.get("quantization_config")
        if args.quantize is not None and quantised is not None:
            about = f"--quantize {args.quantize}: expected a folder of whole weights, "
            raise CommandError(f"{about}{args.model} is quantised by {method_of(quantised)}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        return family.from_pretrained(args.model, dtype=dtype).eval(), tokenizer


def ended_by_turn(config: DiffusionGenerationConfig, model: DiffusionLM, tokenizer: Any) -> DiffusionGenerationConfig:
    """`config` for a turn of a chat: what the template writes behind an answer ends one, as EOS does.

    That is `<|eot_id|>` of LLaDA, `<|im_end|>` of Dream, SDAR and Fast-dLLM v2, `<|role_end|>` of LLaDA2. An EOS
    follows, but perhaps blocks later.
    """
    if not (tokenizer.chat_template and config.stop_at_eos) or config.logits_eos_inf:
        return config
    turns = [{"role": "user", "content": "asked"}, {"role": "assistant", "content": "answered"}]
    after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("answered")[2]
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    with reported(ValueError):
        eos = model.settled(config, {}).eos_ids
    if not ids or ids[0] in eos or not is_special(tokenizer, ids[0]):
        return config
    return replace(config, eos_token_id=[*eos, ids[0]])


def is_special(tokenizer: Any, token: int) -> bool:
    """Whether the text of an answer is without `token`. Not all that are so are among `all_special_ids`."""
    added = tokenizer.added_tokens_decoder.get(token)
    return token in tokenizer.all_special_ids or (added is not None and added.special)


def check_place(option: str, name: str, what: str) -> None:
    """Refuse a name that is neither a folder nor an id, before anybody asks the network for it."""
    if Path(name).is_file():
        raise CommandError(f"{option} {name}: a file, expected the folder of {what}")
    if not Path(name).exists() and (name.count("/") != 1 or name.startswith((".", "~", "/"))):
        raise CommandError(f"{option} {name}: no such folder, and no OWNER/NAME of {what} on the Hugging Face Hub")


def encode(tokenizer: Any, prompt: str, raw: bool) -> torch.Tensor:
    """The prompt's ids `[1, P]`, in the tokenizer's chat template where it has one."""
    if not tokenizer.chat_template or raw:
        return ids_of(tokenizer, prompt)
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return ids_of(tokenizer, text, add_special_tokens=False)


def ids_of(tokenizer: Any, text: str, **options: Any) -> torch.Tensor:
    """The ids `[1, P]` of a text, with a note on standard error where it has words that the model does not know."""
    ids = tokenizer(text, **options)["input_ids"]
    unknown = ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
    if unknown:
        print(f"fdpp: note: {unknown} of {len(ids)} words of the prompt are unknown to the model", file=sys.stderr)
    return torch.tensor([ids], dtype=torch.int64, device="cpu")


def hint_for(model: str, prompt: str) -> str | None:
    """What the embedded model can answer, if it is asked something else; None otherwise."""
    task = tiny.task_of(model)
    if task is None or task.is_problem(prompt):
        return None
    example = task.generate("held-out", 1)[0].prompt
    return (
        f"the small model {task.name} answers nothing but problems like this one: {example} "
        "For other prompts name a model with --model."
    )


def give_hint(model: str, prompt: str) -> None:
    """Print `hint_for` on standard error."""
    hint = hint_for(model, prompt)
    if hint:
        print(f"fdpp: note: {hint}", file=sys.stderr)
