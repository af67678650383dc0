# ruff: noqa: F811 (fixtures come by import)
"""What `qpmerge merge --calibration` accepts: every source gives the same inputs, every kind of
model is given what its own processor or tokenizer makes of them, and what cannot be read is
refused."""

import copy
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_families import (
    EXPERTS,
    SIZE,
    WORDS,
    Family,
    assert_same,
    bert,
    change,
    contents,
    hub,  # noqa: F401
    run,
    state_of,
    texts,
    tokenizer,
)

import qpmerge_lite as q
from qpmerge_lite.checkpoints.calibration import feeds, records, sources, tokens
from qpmerge_lite.checkpoints.compatibility import check

transformers = pytest.importorskip("transformers")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")

SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
PICTURES = {**SMALL, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
LAYERS = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}


def vit():
    return transformers.ViTModel(transformers.ViTConfig(**PICTURES))


def vit_with_head():
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=3, **PICTURES))


def clip_vision():
    config = transformers.CLIPVisionConfig(projection_dim=6, **PICTURES)
    return transformers.CLIPVisionModelWithProjection(config)


def swin():
    config = transformers.SwinConfig(
        image_size=16, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2
    )
    return transformers.SwinForImageClassification(config)


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    return transformers.ResNetForImageClassification(config)


def convnext():
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=16
    )
    return transformers.ConvNextModel(config)


def t5():
    config = transformers.T5Config(
        vocab_size=40,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=1,
        num_heads=2,
        relative_attention_num_buckets=4,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def bart():
    config = transformers.BartConfig(
        vocab_size=40,
        d_model=8,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        max_position_embeddings=16,
        pad_token_id=0,
        decoder_start_token_id=2,
        **LAYERS,
    )
    return transformers.BartForConditionalGeneration(config)


VISION = {
    "vit": vit,
    "vit with a head": vit_with_head,
    "clip": clip_vision,
    "swin": swin,
    "resnet": resnet,
    "convnext": convnext,
}
ANSWERING = {"t5": t5, "bart": bart}


def double(make):
    """In double precision, so that nothing but the mathematics is compared."""
    return lambda: make().to(torch.float64)


def drawn(seed, count=6):
    """Pictures of noise, of different shapes."""
    draw = np.random.default_rng(seed)
    shapes = draw.integers(10, 30, (count, 2))
    arrays = [draw.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    return [Image.fromarray(array) for array in arrays]


def assert_close(folder, model, merge):
    """A folder has what a merge has, as the model's own ``save_pretrained`` writes it."""
    merged = copy.deepcopy(model)
    merged.load_state_dict(merge.state_dict)
    merged.save_pretrained(folder.parent / "expected")
    expected, found = state_of(folder.parent / "expected"), state_of(folder)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)


class Seeing(Family):
    """A base and two experts that read pictures, with a folder of pictures for each."""

    def __init__(self, root, make, **options):
        super().__init__(root, double(make), **options)
        self.processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
        for seed, name in enumerate(EXPERTS, 5):
            self.files[name] = root / "pictures" / name
            (self.files[name] / "b").mkdir(parents=True)
            for number, picture in enumerate(drawn(seed)):
                place = f"{number}.png" if number < 4 else f"b/{number}.png"
                picture.save(self.files[name] / place)
        for folder in self.folders:
            self.processor.save_pretrained(folder)

    def calibration(self, batch_size=8):
        """What the folders hold, made by hand by the processor."""
        made = {}
        for seed, name in enumerate(EXPERTS, 5):
            values = self.processor(images=drawn(seed), return_tensors="pt")["pixel_values"]
            made[name] = [{"pixel_values": part.double()} for part in values.split(batch_size)]
        return made


class Answering(Family):
    """A base and two experts that answer one text with another."""

    def __init__(self, root, make, **options):
        super().__init__(root, double(make), **options)
        for seed, name in enumerate(EXPERTS, 5):
            pairs = zip(texts(seed), texts(seed + 10))
            rows = [json.dumps({"text": text, "target": answer}) for text, answer in pairs]
            self.files[name].write_text("\n".join(rows))

    def calibration(self, batch_size=8):
        """What the files say, made by hand: the decoder reads what the model makes of labels."""
        made = super().calibration(batch_size)
        start, words = self.model.config.decoder_start_token_id, {w: n for n, w in enumerate(WORDS)}
        for seed, name in enumerate(EXPERTS, 15):
            ids = [[start, *(words[word] for word in text.split())][:-1] for text in texts(seed)]
            for place, batch in enumerate(made[name]):
                own = [
                    torch.tensor(row) for row in ids[place * batch_size : (place + 1) * batch_size]
                ]
                pad = torch.nn.utils.rnn.pad_sequence
                batch["decoder_input_ids"] = pad(own, batch_first=True)
                ones = [torch.ones_like(row) for row in own]
                batch["decoder_attention_mask"] = pad(ones, batch_first=True)
        return made


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Families by name, made when they are first asked for."""
    root, made = tmp_path_factory.mktemp("inputs"), {}

    def family(name):
        if name not in made:
            place = root / name.replace(" ", "_")
            if name in VISION:
                made[name] = Seeing(place, VISION[name])
            elif name in ANSWERING:
                made[name] = Answering(place, ANSWERING[name])
            else:
                made[name] = Family(place, double(bert))
        return made[name]

    return family


@pytest.fixture
def words(families, tmp_path):
    """The command without its calibration, for BERTs."""
    family = families("bert")
    return ["merge", *family.folders, "--out", tmp_path / "out", "--method", "regmean"]


def given(**places):
    return [word for name, place in places.items() for word in ("--calibration", f"{name}={place}")]


METHODS = {"auto": {}, "qp": {"basis": "rows", "folds": 2}, "regmean": {}}
RUNS = [(name, "regmean") for name in (*VISION, *ANSWERING)]
RUNS += [
    ("vit", "auto"),
    ("vit", "qp"),
    ("vit with a head", "auto"),
    ("t5", "auto"),
    ("bart", "qp"),
]


@pytest.mark.parametrize(("name", "method"), RUNS, ids=str)
def test_models_of_every_kind_are_merged_as_the_function_merges_them(
    families, name, method, tmp_path, capsys
):
    family, options = families(name), METHODS[method]
    option = [word for k, v in options.items() for word in ("--option", f"{k}={v}")]
    expected = getattr(q, method)(family.model, family.states, family.calibration(4), **options)
    out = tmp_path / "out"
    done = run(capsys, "merge", *family.folders, "--out", out, *family.given,
               "--method", method, "--batch-size", 3, *option)  # fmt: skip
    assert (done[0], done[2]) == (0, ""), done
    assert_close(out, family.model, expected)
    told = json.loads((out / "merge.json").read_text())
    averaged = [name for names in told["averaged"].values() for name in names]
    assert len(averaged) == len(expected.averaged) and len(told["table"]) == len(expected.table)


def test_a_merge_of_vision_models_loads_with_its_processor(families, tmp_path, capsys):
    family, out = families("vit with a head"), tmp_path / "out"
    words = ["merge", *family.folders, "--out", out, *family.given, "--method", "regmean"]
    assert run(capsys, *words)[0] == 0
    model, told = transformers.ViTForImageClassification.from_pretrained(
        out, output_loading_info=True
    )
    assert not any(told.values())
    loaded = transformers.AutoImageProcessor.from_pretrained(out, backend="pil")
    assert loaded.to_dict() == family.processor.to_dict()
    pixels = loaded(images=drawn(1), return_tensors="pt")["pixel_values"].double()
    assert model(pixels).logits.shape == (6, 3)


# ------------------------------------------------------------------------------------- sources


def table(place, columns):
    parquet.write_table(pyarrow.table(columns), place, row_group_size=3)
    return place


def as_parquet(folder, rows):
    return table(folder / "a.parquet", {"label": [1] * len(rows), "text": rows})


def as_lines(folder, rows):
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(rows).encode() + b"\r\n")
    return folder / "a.txt"


def as_json(folder, rows):
    (folder / "Ä ö.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return folder / "Ä ö.jsonl"


@pytest.mark.parametrize("write", [as_parquet, as_lines, as_json])
def test_every_kind_of_file_gives_the_same_rows_evenly_apart(write, tmp_path):
    rows = [f"row {number}\u2028\u0085 ü" for number in range(10)]
    place = write(tmp_path, rows)
    for samples, numbers in ((3, [0, 3, 6]), (10, range(10)), (256, range(10))):
        found = sources.read_source("first", place, ["text"], samples)
        assert [row.content for row in found.rows] == [(rows[n],) for n in numbers]
        assert found.total == 10
    assert found.digest == hashlib.sha256(place.read_bytes()).hexdigest()


def test_a_source_that_is_sorted_is_taken_from_all_over():
    assert sources.spread(10, 3) == [0, 3, 6]
    assert sources.spread(5, 5) == sources.spread(5, 9) == [0, 1, 2, 3, 4]
    assert sources.spread(10**9, 256)[-1] > 0.99 * 10**9


def test_a_large_file_is_never_in_memory(tmp_path):
    import tracemalloc

    line = json.dumps({"text": "w1 " * 300}) + "\n"
    place = tmp_path / "large.jsonl"
    with place.open("w") as file:
        for _ in range(20000):
            file.write(line)
    tracemalloc.start()
    found = sources.read_source("first", place, ["text"], 16)
    (_, peak), size = tracemalloc.get_traced_memory(), place.stat().st_size
    tracemalloc.stop()
    assert len(found.rows) == 16 and found.total == 20000 and peak < size / 10


def test_rows_without_words_are_left_out_and_told(words, tmp_path, capsys):
    first = table(tmp_path / "first.parquet", {"text": ["w1 w2", "", None, " ", "w3"]})
    second = as_lines(tmp_path, texts(6))
    status, told, _ = run(capsys, *words, *given(first=first, second=second))
    assert status == 0 and "note: first: 3 rows of first.parquet have no words: left out" in told
    assert "calibration of first: 2 of 5 inputs" in told


def test_pairs_are_given_to_the_model_as_its_tokenizer_joins_them(families, tmp_path, capsys):
    family, files, batches = families("bert"), {}, {}
    for seed, name in enumerate(EXPERTS, 5):
        pairs = list(zip(texts(seed), texts(seed + 10)))
        columns = {"premise": [a for a, _ in pairs], "hypothesis": [b for _, b in pairs]}
        files[name] = table(tmp_path / f"{name}.parquet", columns)
        batches[name] = [
            dict(family_tokenizer(family)(a, b, return_tensors="pt")) for a, b in pairs
        ]
    out = tmp_path / "out"
    columns = [w for name in EXPERTS for w in ("--column", f"{name}=premise,hypothesis")]
    done = run(capsys, "merge", *family.folders, "--out", out, "--method", "regmean",
               *given(**files), *columns)  # fmt: skip
    assert done[0] == 0, done[2]
    assert_close(out, family.model, q.regmean(family.model, family.states, batches))


def family_tokenizer(family):
    return transformers.AutoTokenizer.from_pretrained(family.base)


TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


def test_chats_are_written_by_the_template(families, tmp_path, capsys):
    family = families("bert")
    chats = {
        name: [
            [{"role": "w3", "content": text}, {"role": "w4", "content": "w5"}]
            for text in texts(seed)
        ]
        for seed, name in enumerate(EXPERTS, 5)
    }
    files, plain = {}, {}
    for name, rows in chats.items():
        files[name] = table(tmp_path / f"{name}.parquet", {"messages": rows})
        plain[name] = tmp_path / f"{name}.txt"
        plain[name].write_text("\n".join(f"w3 {row[0]['content']} w4 w5" for row in rows))
    template = family.base / "chat_template.jinja"
    states = []
    for name in EXPERTS:
        (family.root / name / "chat_template.jinja").write_text(TEMPLATE)
    words = ["merge", *family.folders, "--method", "regmean"]
    for place, given_files in (("chats", files), ("texts", plain)):
        done = run(capsys, *words, "--out", tmp_path / place, *given(**given_files))
        assert done[0] == 0, done[2]
        states.append(state_of(tmp_path / place))
    assert template.read_text() == "{{ messages }}"
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    for name in EXPERTS:
        (family.root / name / "chat_template.jinja").unlink()
    status, _, err = run(capsys, *words, "--out", tmp_path / "out", *given(**files))
    assert status == 1 and "first.parquet, row 1: expected a tokenizer with a chat template" in err
    for name in EXPERTS:
        (family.root / name / "chat_template.jinja").write_text("{{ raise_exception('roles') }}")
    status, _, err = run(capsys, *words, "--out", tmp_path / "out", *given(**files))
    assert status == 1 and "first.parquet, row 1" in err and "roles" in err
    for name in EXPERTS:
        (family.root / name / "chat_template.jinja").unlink()


# ------------------------------------------------------------------------------------- pictures


def red_and_alpha():
    picture = Image.new("RGBA", (12, 12), (200, 10, 30, 0))
    return picture, Image.new("RGB", (12, 12), (200, 10, 30))


def grey():
    return Image.new("L", (12, 12), 77), Image.new("RGB", (12, 12), (77, 77, 77))


def palette():
    colours = Image.new("RGB", (12, 12), (255, 0, 0))
    return colours.quantize(4), colours


def turned():
    picture = drawn(3, 1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    stored = io.BytesIO()
    picture.save(stored, "PNG", exif=exif)
    return Image.open(io.BytesIO(stored.getvalue())), picture.transpose(Image.Transpose.ROTATE_270)


@pytest.mark.parametrize("make", [red_and_alpha, grey, palette, turned])
def test_pictures_become_colours_the_way_their_camera_was_held(make, tmp_path):
    stored, expected = make()
    options = {"exif": stored.getexif()} if make is turned else {}
    stored.save(tmp_path / "a.png", **options)
    feeds_ = sources.read_source("first", tmp_path, ["image"], 9, pictures=True)
    found = feeds.opened(feeds_.rows[0].where, feeds_.rows[0].content)
    assert found.mode == "RGB" and np.array_equal(np.asarray(found), np.asarray(expected))


def test_folders_are_read_by_name_and_one_level_down(tmp_path):
    for name in ("b.png", "a.JPG", "dogs/2.webp", "cats/9.png", "cats/old/1.png", ".x/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "labels.csv").write_text("a,1")
    (tmp_path / "cats" / ".DS_Store").write_text("")
    found = sources.read_source("first", tmp_path, ["image"], 9, pictures=True)
    names = [row.content.relative_to(tmp_path).as_posix() for row in found.rows]
    assert names == ["a.JPG", "b.png", "cats/9.png", "dogs/2.webp"]
    assert found.others == ["cats/old", "labels.csv", "names of folders"]
    sums = [f"{hashlib.sha256((tmp_path / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    assert found.digest == hashlib.sha256("".join(sums).encode()).hexdigest()


def test_pictures_in_parquet_are_those_of_a_folder(families, tmp_path, capsys):
    family, files = families("vit"), {}
    for name, folder in family.files.items():
        content = [path.read_bytes() for path in sorted(folder.rglob("*.png"))]
        rows = [{"bytes": each, "path": "elsewhere.png"} for each in content]
        files[name] = table(tmp_path / f"{name}.parquet", {"img": rows, "label": [0] * len(rows)})
    words = ["merge", *family.folders, "--method", "regmean"]
    assert run(capsys, *words, "--out", tmp_path / "a", *family.given)[0] == 0
    columns = ["--column", "first=img", "--column", "second=img"]
    done = run(capsys, *words, "--out", tmp_path / "b", *given(**files), *columns)
    assert done[0] == 0 and done[1].count("are not read: 'label'") == 1, done
    assert_same(tmp_path / "a", state_of(tmp_path / "b"))


def broken(folder):
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])


def no_picture(folder):
    (folder / "3.png").write_text("hello")


def sixteen_bits(folder):
    Image.fromarray(np.full((8, 8), 300, np.uint16)).save(folder / "3.png")


def emptied(folder):
    for path in folder.rglob("*.png"):
        path.unlink()


DAMAGED = {
    broken: ["first/3.png: expected a picture, found what does not open"],
    no_picture: ["first/3.png: expected a picture, found what does not open"],
    sixteen_bits: ["first/3.png: expected eight bits a colour, found more (mode I;16)"],
    emptied: ["first: expected at least one picture, found none"],
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_pictures_that_do_not_open_are_refused_by_name(damage, tmp_path, capsys):
    family = Seeing(tmp_path / "vit", vit)
    damage(family.files["first"])
    before = contents(family.root)
    words = ["merge", *family.folders, "--out", tmp_path / "out", *family.given]
    status, _, err = run(capsys, *words)
    assert status == 1 and all(part in err for part in DAMAGED[damage]), err
    assert [path.name for path in tmp_path.iterdir()] == ["vit"] and contents(family.root) == before


def test_a_picture_with_more_points_than_is_harmless_is_refused(tmp_path, monkeypatch):
    Image.new("RGB", (12, 12)).save(tmp_path / "a.png")
    for limit in (100, 10):  # where Pillow warns, and where it refuses
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(q.errors.MergeError, match="a.png: expected a picture, found what does"):
            feeds.opened("a.png", tmp_path / "a.png")


def test_another_processor_of_an_expert_is_a_warning_and_its_own_prepares_its_pictures(
    tmp_path, capsys
):
    family = Seeing(tmp_path / "vit", vit)
    other = transformers.ViTImageProcessorPil(
        size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3]
    )
    other.save_pretrained(family.root / "second")
    words = ["merge", *family.folders, "--out", tmp_path / "out", *family.given]
    status, told, _ = run(capsys, *words, "--method", "regmean")
    assert status == 0 and "warning: second: expected the base's processor of pictures" in told
    assert "another image_mean" in told
    calibration = family.calibration()
    values = other(images=drawn(6), return_tensors="pt")["pixel_values"].double()
    calibration["second"] = [{"pixel_values": values}]
    assert_close(
        tmp_path / "out", family.model, q.regmean(family.model, family.states, calibration)
    )


# --------------------------------------------------------------------------------------- the Hub


def test_a_data_set_of_the_hub_is_read_at_its_commit(hub, families, words, tmp_path, capsys):
    family, places = families("bert"), {}
    content = as_parquet(tmp_path, texts(5)).read_bytes()
    commit = hub.add("ours/toy", {"data/train-0.parquet": content, "b.jsonl": b""}, kind="dataset")
    places["first"] = f"hf://datasets/ours/toy@{commit}/data/train-0.parquet"
    places["second"] = family.files["second"]
    done = run(capsys, *words, *given(**places))
    assert (done[0], done[2]) == (0, ""), done
    expected = q.regmean(family.model, family.states, family.calibration())
    assert_close(tmp_path / "out", family.model, expected)
    told = json.loads((tmp_path / "out" / "merge.json").read_text())["calibration"]["first"]
    assert told["file"] == places["first"]
    assert told["sha256"] == hashlib.sha256(content).hexdigest()
    asked = len(hub.requests)
    out = ["merge", *family.folders, "--out", tmp_path / "again", "--method", "regmean"]
    assert run(capsys, *out, *given(**places))[0] == 0
    assert not [r for r in hub.requests[asked:] if r[0] == "GET"]  # the client's cache has it
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


ADDRESSES = {
    "hf://datasets/ours/toy/a.jsonl": ["expected a commit", "found none; write hf://datasets/ours"],
    "hf://datasets/ours/toy@main/a.jsonl": ["found 'main'; write hf://datasets/ours/toy@COMMIT/a"],
    "hf://ours/toy@COMMIT/a.jsonl": ["expected hf://datasets/OWNER/NAME@COMMIT/PATH"],
    "hf://datasets/ours/toy@COMMIT/no.jsonl": [
        "no such file or revision at",
        "correct the address",
    ],
    "hf://datasets/ours/none@COMMIT/a.jsonl": ["no such repository at", "set HF_TOKEN"],
    "hf://datasets/ours/none/a.jsonl": ["no such repository at", "set HF_TOKEN"],
    "hf://datasets/ours/gated@COMMIT/a.jsonl": ["gated", "accept its terms at"],
    "hf://datasets/ours/toy@COMMIT/a.csv": ["a.csv: expected JSON lines, Parquet or plain text"],
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_what_the_hub_does_not_give_is_refused_with_the_reason(
    hub, families, words, address, tmp_path, capsys
):
    files = {"a.jsonl": b'{"text": "w1"}', "a.csv": b"text"}
    commit = hub.add("ours/toy", files, kind="dataset")
    hub.add("ours/gated", files, kind="dataset")
    hub.gated["ours/gated"] = "token"
    second = families("bert").files["second"]
    place = address.replace("COMMIT", commit)
    status, _, err = run(capsys, *words, *given(first=place, second=second))
    expected = [part.replace("@COMMIT/a", f"@{commit}/a") for part in ADDRESSES[address]]
    assert status == 1 and all(part in err for part in expected), err
    assert not (tmp_path / "out").exists()


def test_a_hub_out_of_reach_is_said(families, words, tmp_path, monkeypatch, capsys):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    place, second = f"hf://datasets/a/b@{'0' * 40}/c.jsonl", families("bert").files["second"]
    status, _, err = run(capsys, *words, *given(first=place, second=second))
    assert status == 1 and "was not reached" in err and "check the network" in err


# ------------------------------------------------------------------------------------- refusals


def written(name, content):
    def write(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / name

    return write


def of_columns(**columns):
    return lambda folder: table(folder / "a.parquet", columns)


FILES = {
    "empty Parquet": (
        of_columns(text=pyarrow.array([], "string")),
        ["at least one text, found none"],
    ),
    "only blanks": (of_columns(text=["", None]), ["expected at least one text, found none"]),
    "numbers": (of_columns(text=[1, 2]), ["row 1: expected words in the field 'text', found 1"]),
    "other columns": (
        of_columns(sentence=["w1"], label=[0]),
        ["row 1: expected a field 'text', found only 'sentence', 'label'", "--column first=FIELD"],
    ),
    "damaged Parquet": (
        written("a.parquet", b"PAR1 no"),
        ["a.parquet: expected a file in Parquet"],
    ),
    "nested": (written("a.jsonl", '{"text": {"en": "w1"}}'), ["found {'en': 'w1'}"]),
    "deeply nested": (written("a.jsonl", "[" * 100000), ["line 1: expected an object of JSON"]),
    "half a pair": (written("a.jsonl", '{"text": "\\ud800"}'), ["half of a surrogate pair"]),
    "another encoding": (
        written("a.txt", "w1 w2\nw3".encode("utf-16-le")),
        ["a.txt, line 1: expected text in UTF-8, found a null character at position 1"],
    ),
    "another encoding with its mark": (
        written("a.txt", "w1 w2\nw3".encode("utf-16")),
        ["a.txt, line 1: expected text in UTF-8, found a byte that is none at position 0"],
    ),
    "a chat of another form": (
        written("a.jsonl", '{"messages": [{"from": "user", "value": "w1"}]}'),
        ["line 1: expected words, or messages with role and content, in the field 'messages'"],
    ),
    "an empty chat": (written("a.jsonl", '{"messages": []}'), ["messages with role and content"]),
    "a folder": (lambda folder: folder, ["as the model reads texts, found a folder"]),
    "a picture": (written("a.png", b""), ["as the model reads texts, found a picture"]),
    "a pickle": (written("a.pkl", b""), ["a.pkl: expected JSON lines, Parquet or plain text"]),
}


@pytest.mark.parametrize("name", FILES)
def test_sources_of_another_kind_are_refused(families, words, name, tmp_path, capsys):
    (tmp_path / "given").mkdir()
    write, expected = FILES[name]
    places = {"first": write(tmp_path / "given"), "second": families("bert").files["second"]}
    status, _, err = run(capsys, *words, *given(**places))
    assert status == 1 and all(part in err for part in expected), err
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


USAGE = {
    "three columns": (["--column", "first=a,b,c"], ["--column: expected 1 or 2 fields", "a, b, c"]),
    "column of nobody": (["--column", "third=a"], ["--column: expected one of the experts (first"]),
    "no samples": (["--samples", "0"], ["--samples: expected a whole number from 1 on, found 0"]),
    "another column": (["--column", "first=a"], ["first.jsonl, line 1: expected a field 'a'"]),
}


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage_is_refused(families, words, name, tmp_path, capsys):
    more, expected = USAGE[name]
    status, _, err = run(capsys, *words, *families("bert").given, *more)
    assert status == 1 and all(part in err for part in expected), err


def test_one_file_for_two_experts_is_a_warning(families, words, tmp_path, capsys):
    file = families("bert").files["first"]
    status, told, _ = run(capsys, *words, *given(first=file, second=file))
    assert status == 0 and "expected inputs of its own, found the same file as of 'first'" in told
    manifest = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert [w["found"] for w in manifest["warnings"]] == ["the same file as of 'first'"]


def test_inputs_that_two_experts_share_are_a_warning(families, words, tmp_path, capsys):
    mixed = as_lines(tmp_path, [*texts(5)[:3], *texts(6)[3:]])
    file = families("bert").files["first"]
    _, told, _ = run(capsys, *words, *given(first=file, second=mixed))
    assert "expected inputs of its own, found 3 of 10 inputs of 'first' too" in told


def test_what_was_cut_or_is_too_little_is_told(families, words, tmp_path, capsys):
    long = as_lines(tmp_path, ["w1 " * 30, "w2 w3", "w4 " * 17])
    places = given(first=long, second=families("bert").files["second"])
    status, told, _ = run(capsys, *words, *places, "--samples", 3)
    assert status == 0 and "note: first: 2 texts were cut to 16 tokens" in told
    assert "calibration of second: 3 of 10 inputs" in told
    out = [*words[:5], tmp_path / "few", *words[6:]]
    status, told, _ = run(capsys, *out, *places, "--samples", 1, "--max-length", 4)
    assert "note: first: 4 tokens are fewer than the 12 inputs of the widest layer" in told
    told = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert "first: 2 texts were cut to 16 tokens" in told["notes"]
    assert (
        told["calibration"]["second"]["inputs"] == 3 and told["calibration"]["second"]["of"] == 10
    )


def test_one_text_is_enough_where_nothing_is_folded(families, words, tmp_path, capsys):
    one = as_lines(tmp_path, ["w1 w2"])
    places = given(first=one, second=families("bert").files["second"])
    assert run(capsys, *words, *places)[0] == 0
    for method in ("auto", "qp"):
        out = [*words[:5], tmp_path / method, "--method", method]
        status, _, err = run(capsys, *out, *places)
        assert status == 1 and "'first'" in err and "one" in err, err


def audio():
    config = transformers.Wav2Vec2Config(
        num_conv_pos_embeddings=4, conv_dim=[4], conv_stride=[2], conv_kernel=[2],
        num_feat_extract_layers=1, num_conv_pos_embedding_groups=2, **SIZE,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config)


def both_towers():
    text = {**SMALL, "num_attention_heads": 2, "vocab_size": 40, "max_position_embeddings": 16}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=PICTURES, projection_dim=6)
    )


def classifying():
    return transformers.BartForSequenceClassification(bart().config)


READ = "expected a model that reads texts, or one that reads pictures, found "
OTHERS = {
    audio: READ + "Wav2Vec2Model, which reads input_values",
    both_towers: READ + "CLIPModel, which reads both at once",
    classifying: "found BartForSequenceClassification, an encoder with a decoder and no words",
}


@pytest.mark.parametrize("make", OTHERS)
def test_models_that_read_something_else_are_refused_by_name(make, tmp_path, capsys):
    family = Family(tmp_path / "models", make)
    words = ["merge", *family.folders, "--out", tmp_path / "out"]
    status, _, err = run(capsys, *words, *family.given, "--method", "regmean")
    assert status == 1 and OTHERS[make] in err and "looks at weights only" in err, err
    assert run(capsys, *words)[0] == 0


def test_texts_for_a_model_of_pictures_and_no_processor_are_refused(tmp_path, capsys):
    family = Seeing(tmp_path / "vit", vit)
    (tmp_path / "a.txt").write_text("w1")
    words = ["merge", *family.folders, "--out", tmp_path / "out"]
    status, _, err = run(capsys, *words, *given(first=tmp_path / "a.txt", second=tmp_path / "b"))
    assert status == 1 and "a.txt: expected pictures, which the model reads" in err, err
    for folder in family.folders:
        Path(folder, "preprocessor_config.json").unlink()
    status, _, err = run(capsys, *words, *family.given)
    assert status == 1 and "expected a processor of pictures in the expert's folder or" in err


@pytest.mark.parametrize("package", ["pyarrow", "huggingface_hub", "PIL"])
def test_a_package_that_is_missing_is_named_with_what_to_do(package, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "find_spec", lambda name: None if name == package else name)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(q.errors.MergeError, match=f"expected {package}, which .*'qpmerge-lite.hub"):
        if package == "PIL":
            feeds.opened("a.png", tmp_path / "a.png")
        place = as_parquet(tmp_path, ["a"]) if package == "pyarrow" else "hf://datasets/a/b/c"
        sources.read_source("first", place, ["text"], 3)


def test_what_a_decoder_begins_with_has_to_be_known(families, tmp_path, capsys):
    family = Answering(tmp_path / "t5", t5)
    for folder in family.folders:
        change(Path(folder), decoder_start_token_id=None)
    words = ["merge", *family.folders, "--out", tmp_path / "out", *family.given]
    status, _, err = run(capsys, *words)
    assert status == 1 and "config.json, decoder_start_token_id: expected the token" in err


def test_an_encoder_alone_of_a_pair_reads_texts(tmp_path):
    family = Family(tmp_path / "t5", lambda: transformers.T5EncoderModel(t5().config))
    report = check(family.base, {name: family.root / name for name in EXPERTS})
    made = feeds.feed(report, family.files, {}, samples=9, max_length=9, batch_size=8)
    assert made.batches["first"][0].keys() == {"input_ids", "attention_mask"}


def test_the_tokenizer_is_the_expert_s_own():
    rows = [sources.Row("a", ("w1",))]
    assert tokens.token_rows(rows, tokenizer(), 9)[0] == [{"input_ids": [3]}]
