"""Stores and mixtures, read as a SeqIO user reads them."""

import collections
import pathlib
import textwrap

import numpy as np
import pytest
import seqio
from tiny_stages import LENGTH, dataset_of, stages
from tiny_stores import tiny_store, write_store

from configs.mixtures import CT_LLM_TOKEN_SHARES
from ctllm_jax.common.errors import UserError
from ctllm_jax.data.batches import row_arrays
from ctllm_jax.data.store import open_store
from data_pipeline import mixtures
from data_pipeline.store_tasks import PACKED_FEATURES, store_tasks

SHARES = {"zh_cc": 0.5, "en": 0.3, "code": 0.2}


@pytest.fixture(scope="module")
def root() -> pathlib.Path:
    return stages()


@pytest.fixture(scope="module")
def registered(root) -> dict[str, str]:
    """The names of the two mixtures over `root`."""
    return mixtures.register(root / "corpus", root / "pretrain", SHARES)


def get(name: str, split: str = "train", converter=None, lengths=None, **options) -> list[dict]:
    """seqio.get_dataset, packed rows unless told otherwise."""
    converter = converter or seqio.PrePackedLMFeatureConverter()
    lengths = lengths or {"targets": LENGTH}
    return list(seqio.get_dataset(name, lengths, converter, split, **options).as_numpy_iterator())


def multiset(examples: list[dict]) -> collections.Counter:
    return collections.Counter(example["decoder_target_tokens"].tobytes() for example in examples)


# ---- Stores


@pytest.mark.parametrize("kind", ["pretrain", "chat"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_packed_examples_are_what_our_reader_gives(root, kind, split):
    """Place by place: SeqIO shows the token before the one to predict, our reader a token and the one after it."""
    store, seen = open_store(root / kind), 0
    names = store_tasks(root / kind, packed=True, prefix=kind)
    for source in store.sources(split):
        examples, rows = get(names[source], split), list(store.rows(split, source))
        for example, row in zip(examples, rows, strict=True):
            ours = row_arrays(row, LENGTH, kind, mask_documents=True)
            assert example.keys() == set(PACKED_FEATURES)
            assert all(values.shape == (LENGTH,) and values.dtype == np.int32 for values in example.values())
            assert example["decoder_target_tokens"].tolist() == ours["tokens"].tolist()
            assert example["decoder_segment_ids"].tolist() == ours["segments"].tolist()
            assert example["decoder_positions"].tolist() == ours["positions"].tolist()
            inputs, targets, weights = (
                example[f"decoder_{name}"].tolist() for name in ("input_tokens", "target_tokens", "loss_weights")
            )
            assert inputs[0] == weights[0] == 0 and ours["weights"][-1] == 0
            for i in range(1, LENGTH):
                before = {name: values[i - 1] for name, values in ours.items()}
                assert weights[i] == before["weights"]
                begins = ours["segments"][i] != before["segments"]
                assert inputs[i] == (0 if begins else before["tokens"])
                if weights[i]:
                    assert not begins and targets[i] == before["labels"] and inputs[i] == before["tokens"]
            seen += sum(weights)
    counted = sum(entry["learned"] for entry in store.info["splits"][split].values())
    assert seen == counted > 0


def test_packed_examples_are_what_the_standard_converter_makes_of_the_same_segments(root):
    """But for the weights: SeqIO's also predicts each segment's first token, from nothing."""
    packed, pieces = (store_tasks(root / "pretrain", packed=p)["zh_cc"] for p in (True, False))
    rows = list(open_store(root / "pretrain").rows("train", "zh_cc"))
    segments = seqio.get_mixture_or_task(pieces).get_dataset(split="train", shuffle=False)
    first_segment = np.cumsum([0] + [len(row.lengths) for row in rows])
    examples = get(packed)
    for number in np.argsort([-len(row.lengths) for row in rows], kind="stable")[:3]:  # the fullest rows
        count, ours = len(rows[number].lengths), examples[number]
        own = segments.skip(first_segment[number]).take(count)
        (theirs,) = seqio.LMFeatureConverter(pack=True)(own, {"targets": LENGTH}).as_numpy_iterator()
        begins = (ours["decoder_positions"] == 0) & (ours["decoder_segment_ids"] > 0)
        assert theirs.keys() == ours.keys() and begins.sum() == count > 1
        for name in PACKED_FEATURES:
            assert np.array_equal(theirs[name] != ours[name], begins & (name == "decoder_loss_weights")), name


def test_unpacked_examples_are_the_segments_in_order(root):
    for kind in ("pretrain", "chat"):
        store = open_store(root / kind)
        for source, name in store_tasks(root / kind, packed=False, prefix=kind).items():
            found = iter(dataset_of(name, "train"))
            for row in store.rows("train", source):
                mask = np.ones(len(row.tokens), int) if row.mask is None else row.mask
                cuts = np.cumsum(row.lengths)[:-1]
                parts = zip(np.split(row.tokens, cuts), np.split(mask, cuts), row.ids, strict=True)
                for number, (tokens, learned, identity) in enumerate(parts):
                    example = next(found)
                    assert example["targets"].tolist() == tokens.tolist()
                    assert example["loss_mask"].tolist() == learned.tolist()
                    assert example["id"].decode() == identity
                    assert example["start"] == (row.starts[number] if row.starts else 0)
            assert next(found, None) is None


@pytest.mark.parametrize("hosts", [3, 6])  # the store has 4 shards: more hosts divide its examples
def test_hosts_share_a_store_without_loss_or_repeat(root, hosts, tmp_path):
    name = many_shards(root, tmp_path)
    task = seqio.get_mixture_or_task(name)
    assert len(task.source.list_shards("train")) == 4
    parts = [get(name, shard_info=seqio.ShardInfo(host, hosts)) for host in range(hosts)]
    whole = get(name)
    assert sum((multiset(part) for part in parts), collections.Counter()) == multiset(whole)
    assert task.num_input_examples("train") == len(whole) == sum(map(len, parts))
    assert task.splits == ("train", "validation")


def many_shards(root, folder) -> str:
    """A task over a store of several shards."""
    made = tiny_store(folder / "made", length=LENGTH, rows=24)
    rows = {split: {"zh": list(made.rows(split, "zh"))} for split in ("train", "validation")}
    write_store(folder / "store", rows, "pretrain", LENGTH, shards=4)
    return store_tasks(folder / "store", packed=True, prefix="many")["zh"]


def test_shuffling_depends_on_the_seed_and_epochs_repeat_every_row(root, tmp_path):
    name = many_shards(root, tmp_path)
    plain, once = get(name), get(name, shuffle=True, seed=1)
    order = [example["decoder_target_tokens"].tobytes() for example in once]
    again = [example["decoder_target_tokens"].tobytes() for example in get(name, shuffle=True, seed=1)]
    other = [example["decoder_target_tokens"].tobytes() for example in get(name, shuffle=True, seed=2)]
    assert order == again != other
    assert order != [example["decoder_target_tokens"].tobytes() for example in plain]
    assert collections.Counter(order) == collections.Counter(other) == multiset(plain)
    twice = multiset(get(name, num_epochs=2))
    assert twice == multiset(plain) + multiset(plain)


def test_what_a_store_cannot_give_is_refused(root):
    with pytest.raises(UserError, match="a store of preferences; `chat_tasks.preference_tasks`"):
        store_tasks(root / "preference", packed=True)
    name = store_tasks(root / "pretrain", packed=True)["zh_cc"]
    with pytest.raises(UserError, match="rows have 64 tokens, task_feature_lengths asks for targets of 32"):
        get(name, lengths={"targets": 32})


# ---- Converters


@pytest.mark.parametrize("pack", [True, False])
def test_tasks_of_documents_work_with_the_standard_converter(registered, pack):
    for name in ("map_cc_zh_cc", "ct_llm_segments_zh_cc", registered["documents"]):
        examples = get(name, converter=seqio.DecoderFeatureConverter(pack=pack), lengths={"targets": 256})
        assert all(len(values) == 256 for values in examples[0].values())
        assert all(example["decoder_loss_weights"].any() for example in examples)
        assert ("decoder_segment_ids" in examples[0]) == pack
        if pack and "segments" in name:  # they are short: several fit
            assert max(example["decoder_segment_ids"].max() for example in examples) > 3


# ---- Mixtures


def test_the_papers_shares_add_up():
    chinese = sum(share for source, share in CT_LLM_TOKEN_SHARES.items() if source.startswith("zh_"))
    assert chinese == pytest.approx(66.99) and sum(CT_LLM_TOKEN_SHARES.values()) == pytest.approx(100)


def drawn(mixture: str, tasks: dict[str, str], feature: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(source, tokens) of the first examples of a mixture; the source is told by the tokens themselves."""
    owners = {}
    for number, name in enumerate(tasks.values()):
        for example in seqio.get_mixture_or_task(name).get_dataset(None, shuffle=False).as_numpy_iterator():
            owners[np.trim_zeros(example[feature], "b").tobytes()] = number
    dataset = seqio.get_mixture_or_task(mixture).get_dataset(None, shuffle=False, num_epochs=None, seed=3)
    found = [np.trim_zeros(e[feature], "b") for e in dataset.take(count).as_numpy_iterator()]
    return np.array([owners[tokens.tobytes()] for tokens in found]), np.array([len(tokens) for tokens in found])


@pytest.mark.parametrize(
    ("unit", "feature", "count"), [("documents", "targets", 6000), ("rows", "decoder_target_tokens", 2000)]
)
def test_mixtures_meet_their_shares_of_tokens(registered, unit, feature, count):
    prefix = "map_cc" if unit == "documents" else "ct_llm_rows"
    owner, tokens = drawn(registered[unit], {source: f"{prefix}_{source}" for source in SHARES}, feature, count)
    for number, (source, share) in enumerate(SHARES.items()):
        own = tokens * (owner == number)
        error = (own - share * tokens).std() / tokens.mean() / len(tokens) ** 0.5
        assert error < 0.02  # or the next line says little
        assert abs(own.sum() / tokens.sum() - share) < 4 * error, source
    if unit == "documents":  # the shares of examples are others: that is what is tested
        assert (
            max(abs((owner == n).mean() - share) for n, share in enumerate(SHARES.values())) > 0.026
        )  # four of its errors


def test_mean_tokens_are_exact(root):
    names = {source: f"map_cc_{source}" for source in SHARES}
    mixtures.register(root / "corpus", root / "pretrain", SHARES)
    for source, mean in mixtures.mean_tokens(root / "pretrain", "documents").items():
        assert mean == pytest.approx(np.mean([len(e["targets"]) for e in dataset_of(names[source], "train")]), abs=1e-9)
    store = open_store(root / "pretrain")
    for source, mean in mixtures.mean_tokens(root / "pretrain", "rows").items():
        assert mean == pytest.approx(np.mean([len(row.tokens) for row in store.rows("train", source)]), abs=1e-9)
    for kind, unit in (("chat", "documents"), ("pretrain", "row")):
        with pytest.raises(UserError, match=f"mean tokens of {unit}: there are those of rows and, of kind pretrain"):
            mixtures.mean_tokens(root / kind, unit)


def test_a_source_that_the_corpus_lacks_is_a_choice(root, registered, capsys):
    arguments = (root / "corpus", root / "pretrain", CT_LLM_TOKEN_SHARES)
    with pytest.raises(
        UserError, match="shares are given for zh_books, zh_papers, zh_others, zh_baike, the tasks have"
    ):
        mixtures.register(*arguments)
    names = mixtures.register(*arguments, missing="drop")
    told = capsys.readouterr().err.splitlines()[0]
    assert told.startswith("mixture ct_llm_documents: dropped zh_books, zh_papers, zh_others, zh_baike; ")
    assert told.endswith("zh_cc 63.22%, en 27.96%, code 8.81%")
    means = mixtures.mean_tokens(root / "pretrain", "rows")
    mixture = seqio.get_mixture_or_task(names["rows"])
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    assert rates == {f"ct_llm_rows_{s}": pytest.approx(CT_LLM_TOKEN_SHARES[s] / means[s]) for s in SHARES}


@pytest.mark.parametrize(
    ("shares", "means", "missing", "message"),
    [
        ({"zh_cc": 1}, {}, "error", "no share is given for en; 0 leaves a source out"),
        ({"zh_cc": 1, "en": 0}, {"en": 3.0}, "error", "how many tokens examples of zh_cc have is not known"),
        ({"zh_cc": -1, "en": 1}, {}, "error", "the share of zh_cc is -1"),
        ({"zh_cc": float("nan"), "en": 1}, {}, "error", "the share of zh_cc is nan"),
        ({"zh_cc": 0, "en": 0}, {}, "error", "no source is left"),
        ({"zh_cc": 0, "en": 0, "moon": 1}, {}, "drop", "no source is left"),
        ({"zh_cc": 1, "en": 1}, {}, "perhaps", "missing 'perhaps' is unknown"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(shares, means, missing, message):
    with pytest.raises(UserError, match=message):
        mixtures.token_mixture("bad", {"zh_cc": "a", "en": "b"}, shares, means, missing)


def test_a_share_of_zero_leaves_a_source_out(root, registered):
    names = mixtures.register(root / "corpus", root / "pretrain", {"zh_cc": 0, "en": 2, "code": 1}, name="two")
    found = {task.name for task in seqio.get_mixture_or_task(names["rows"]).tasks}
    assert found == {"two_rows_en", "two_rows_code"}


def test_rounds_weigh_tokens_as_often_as_they_are_gone_through():
    shares = mixtures.shares_of_rounds({"en": 100, "code": 51, "zh_cc": 200}, {"en": 2, "code": 0.5, "zh_cc": 1})
    assert shares == {"en": 200 / 425, "code": 25 / 425, "zh_cc": 200 / 425}
    with pytest.raises(UserError, match="name different sources: code"):
        mixtures.shares_of_rounds({"en": 1}, {"en": 1, "code": 1})
    with pytest.raises(UserError, match="leave no tokens"):
        mixtures.shares_of_rounds({"en": 1}, {"en": 0})


def test_the_lines_that_the_module_shows_work(root):
    """The two blocks of the docstring, run as they stand but for the folders and the length of a row."""
    blocks = [line for line in mixtures.__doc__.splitlines() if line.startswith("    ")]
    program = textwrap.dedent("\n".join(blocks))
    assert program.count("register(") == 1 and program.count("seqio.get_dataset(") == 2
    for name, folder in (("CORPUS", "corpus"), ("STORE", "pretrain")):
        program = program.replace(f'"{name}"', repr(str(root / folder)))
    program = program.replace("4096", str(LENGTH)).replace("seqio.get_dataset", "found += seqio.get_dataset")
    program = "\n".join(f"{line}.take(3)" if line.startswith("found") else line for line in program.splitlines())
    names = {"seqio": seqio, "found": []}
    exec(program, names)  # noqa: S102
    assert len(names["found"]) == 6


def test_a_store_that_is_no_corpus_makes_no_mixture(root):
    with pytest.raises(UserError, match="a store of kind chat; a mixture with documents needs one of kind pretrain"):
        mixtures.register(root / "corpus", root / "chat", SHARES)
