#!/usr/bin/env python3
"""Whether the PEFT library and veiltune take each other's adapters, and compute the same with them.

- LoRA by `veiltune train`, loaded by PEFT, on each layout of vision transformers. The head reads the class token, as in
  the ViT and DeiT classifiers of `transformers`; those of DINOv2 and CLIP have another head, which is not used here.
- LoRA by PEFT, taken over by `veiltune import`, on ViT and DeiT; and loaded by PEFT once more as it was then written.
- Prompts by `veiltune tune`, loaded by PEFT, for a causal and a masked model. A concatenated prompt that begins a causal
  model's sequence is run by PEFT's own forward pass. PEFT has no place for the others: what it loaded is put here where
  veiltune has it, in what enters the first layer, which in a masked model is behind the norm of the embedded words.

Run from the repository root:

    cargo build --release
    python3 -m venv venv && venv/bin/pip install torch 'transformers>=5.18' peft safetensors tokenizers numpy pillow
    venv/bin/python tools/peft-check.py [VEILTUNE]

VEILTUNE is target/release/veiltune unless given. Models are tiny and random, or embedded; nothing is downloaded. Prints
the largest difference of each comparison, and for each control the least that a wrong adapter changes. The exit status is
1 if anything differs or goes wrong. `transformers` renamed the modules of ViT and DeiT in 5.9, those of DINOv2 in 5.18.
`veiltune import` reads adapters of before and after; PEFT with an earlier version finds nothing in ours.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ |= dict(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers as t  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

t.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

# Limits of differences of log-probabilities and losses: in floating point; there where GELU is the series that the
# protocols have for it; in their fixed point, which draws masks; and, for floating point, the least that a control must see.
FLOAT, SERIES, FIXED, CONTROL = 5e-5, 5e-4, 2e-2, 1e-2

SIDE, WIDTH, RANK = 16, 12, 3
CLASSES = ["ant", "bee", "cow"]
SIZES = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=3, image_size=SIDE, patch_size=4)
MLP = dict(intermediate_size=24)
LABELS = dict(id2label=dict(enumerate(CLASSES)), label2id={c: i for i, c in enumerate(CLASSES)})

# Name: (configuration, class, the part of the model below the classifier).
VISION = {
    "vit": (t.ViTConfig(**SIZES, **MLP, **LABELS), t.ViTForImageClassification, "vit"),
    "vit-relu": (t.ViTConfig(**SIZES, **MLP, **LABELS, hidden_act="relu"), t.ViTForImageClassification, "vit"),
    "deit": (t.DeiTConfig(**SIZES, **MLP, **LABELS), t.DeiTForImageClassification, "deit"),
    "dinov2": (t.Dinov2Config(**SIZES, mlp_ratio=2, layerscale_value=0.7, **LABELS), t.Dinov2ForImageClassification,
               "dinov2"),
    "dinov2-relu": (t.Dinov2Config(**SIZES, mlp_ratio=2, layerscale_value=0.7, hidden_act="relu", **LABELS),
                    t.Dinov2ForImageClassification, "dinov2"),
    "clip": (t.CLIPConfig(vision_config=dict(**SIZES, **MLP), **LABELS), t.CLIPForImageClassification, "vision_model"),
}
# Of LoRA by PEFT: (projections, other settings).
IMPORTED = {
    "vit": ("qv", dict(lora_alpha=6, modules_to_save=["classifier"])),
    "vit-relu": ("k", dict(lora_alpha=5, modules_to_save=["classifier"])),
    "deit": ("qkv", dict(lora_alpha=2, use_rslora=True, modules_to_save=["layernorm", "classifier"])),
}
PROJECTIONS = dict(q=("query", "q_proj"), k=("key", "k_proj"), v=("value", "v_proj"))

SYLLABLES = [a + b for a in "bdfklmn" for b in "aeiou"]
DEMO = Path("assets/demo-text")
TOKENS, ROW, INITIAL = 5, 32, "la me"
# Texts that `veiltune tune --test` lays out at once.
MEASURED = 32


class Report:
    """What agreed, and how many things did not."""

    def __init__(self):
        self.failed = 0

    def line(self, good, text):
        self.failed += not good
        print(f"{'ok   ' if good else 'WRONG'} {text}", flush=True)

    def close(self, what, difference, limit, also=True, text=""):
        # Not a number is wrong.
        good = difference <= limit and also
        self.line(good, f"{what} differ by at most {difference:.1e} ({limit:.0e} is allowed){text}")

    def matters(self, what, effects):
        least = np.min(effects)
        self.line(least >= CONTROL, f"  control: {what} changes them by {least:.1e} or more ({CONTROL:.0e} is needed)")

    def run(self, what, check, *args):
        try:
            check(self, *args)
        except Exception as e:  # noqa: BLE001  (the others are still checked)
            self.line(False, f"{what}: {type(e).__name__}: {' '.join(str(e).split())[:400]}")


def veiltune(*args):
    """Standard output."""
    done = subprocess.run([VEILTUNE, *map(str, args)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"veiltune {args[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def randomise(parameters, scale):
    """Nothing keeps an initial value under which it would not matter: zero biases, unit gains."""
    with torch.no_grad():
        for p in parameters:
            p.add_(scale * torch.randn_like(p))


def most(a, b):
    return (a - b).abs().max().item()


# Pictures.


def pictures(dir):
    """Training pictures, and some to test on; each class has its colour, not a clear one."""
    random = np.random.default_rng(1)
    for part, count in ("train", 16), ("test", 2):
        for i, name in enumerate(CLASSES):
            folder = dir / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                picture = random.random((SIDE, SIDE, 3)) < np.where(np.arange(3) == i, 0.6, 0.4)
                Image.fromarray(255 * picture.astype(np.uint8)).save(folder / f"{number}.png")


def pixels(paths):
    """As preprocessor_config.json says; they need not be resized."""
    planes = [np.asarray(Image.open(path), np.float32).transpose(2, 0, 1) / 255 for path in paths]
    return torch.tensor((np.stack(planes) - 0.5) / 0.5)


def backbone(name, seed, dir):
    """A random one in the layout of the model hub."""
    torch.manual_seed(seed)
    config, cls, _ = VISION[name]
    model = cls(config)
    randomise(model.parameters(), 0.3)
    # Half precision then holds embedded patches exactly, except behind the norm that CLIP has there.
    with torch.no_grad():
        for part, p in model.named_parameters():
            if ".embeddings." in part:
                p.copy_((64 * p).round() / 64)
    model.save_pretrained(dir)
    settings = dict(do_resize=True, size=dict(height=SIDE, width=SIDE), resample=2, do_rescale=True,
                    rescale_factor=1 / 255, do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    (dir / "preprocessor_config.json").write_text(json.dumps(settings))


def classifier(name, dir):
    """The backbone in the class that has a classifier, of which only the place is taken."""
    model = VISION[name][1].from_pretrained(dir)
    model.classifier = torch.nn.Linear(WIDTH, len(CLASSES))
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    assert len(layers) == SIZES["num_hidden_layers"]
    # What enters the first block comes from a cache in half precision, where `veiltune evaluate` runs a model.
    def rounded(_, args):
        return args[0].half().float(), *args[1:]
    layers[0].register_forward_pre_hook(rounded)
    return model.eval()


def by_peft(model, name, inputs):
    """Log-probabilities."""
    with torch.no_grad():
        if VISION[name][2] in ("vit", "deit"):
            logits = model(inputs).logits
        else:
            base = model.get_base_model()
            states = getattr(base, VISION[name][2])(inputs)
            logits = base.classifier(states.pooler_output if name == "clip" else states.last_hidden_state[:, 0])
        return logits.double().log_softmax(-1)


def evaluated(data, adapter, dir, arithmetic):
    options = "--adapter", adapter, "--backbone", dir, "--cache", dir.parent / "cache", "--threads", 1, "--json"
    result = json.loads(veiltune("evaluate", "--data", data, "--arithmetic", arithmetic, *options))
    if result["beyond_range"] > 0:
        raise RuntimeError(f"{result['beyond_range']} pictures are beyond a calibrated range")
    return result["loss"], result["accuracy"]


def by_veiltune(paths, adapter, dir, arithmetic):
    """Log-probabilities, from mean losses: of a picture that is once in each class and once more in one."""
    count, rows = len(CLASSES), []
    weights = (np.eye(count) + 1) / (count + 1)
    for path in paths:
        losses = []
        for twice in range(count):
            with tempfile.TemporaryDirectory() as data:
                for i, name in enumerate(CLASSES):
                    (Path(data) / name).mkdir()
                    # The cache tells pictures apart by names and sizes.
                    for copy in range(1 + (i == twice)):
                        (Path(data) / name / f"{path.parent.name}-{path.stem}-{copy}.png").write_bytes(path.read_bytes())
                losses.append(evaluated(data, adapter, dir, arithmetic)[0])
        rows.append(-np.linalg.solve(weights, losses))
    return torch.tensor(np.stack(rows))


def compare(report, what, model, name, adapter, dir):
    """PEFT's model and veiltune's adapter on the test pictures; and whether each trained tensor is noticed."""
    data = dir.parent / "pictures"
    paths = sorted((data / "test").glob("*/*.png"))
    inputs, truth = pixels(paths), torch.tensor([CLASSES.index(path.parent.name) for path in paths])
    theirs = by_peft(model, name, inputs)
    plain = FLOAT if name.endswith("relu") else SERIES
    for arithmetic, limit in ("float", plain), ("served", plain), ("fixed", FIXED):
        ours = by_veiltune(paths, adapter, dir, arithmetic)
        same = (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
        counted = evaluated(data, adapter, dir, arithmetic)[1]
        accuracy = (theirs.argmax(-1) == truth).double().mean().item()
        text = f"; {same} of {len(paths)} labels are the same; accuracies are {counted:.3f} and {accuracy:.3f}"
        also = same == len(paths) and abs(counted - accuracy) < 1e-9
        report.close(f"{what}, {arithmetic}: log-probabilities", most(ours, theirs), limit, also, text)
    effects = []
    for part, p in model.named_parameters():
        if "lora_" in part or "modules_to_save" in part:
            kept = p.detach().clone()
            with torch.no_grad():
                p.zero_()
                effects.append(most(by_peft(model, name, inputs), theirs))
                p.copy_(kept)
    report.matters(f"each of {len(effects)} trained tensors, set to zero,", effects)


def loaded(report, what, name, adapter, dir):
    """By PEFT, which must have found a place for each tensor and left none at random."""
    model = peft.PeftModel.from_pretrained(classifier(name, dir), adapter)
    stored, held = load_file(adapter / "adapter_model.safetensors"), peft.get_peft_model_state_dict(model)
    equal = [part for part in held if part in stored and torch.equal(held[part], stored[part])]
    good = len(equal) == len(held) == len(stored)
    report.line(good, f"{what}: PEFT holds {len(held)} tensors, the file {len(stored)}, {len(equal)} are equal")
    return model


def exported(report, name, work):
    dir, adapter, data = work / name, work / f"{name}-lora", work / "pictures"
    # Without validation the last epoch is kept, and not, perhaps, the start, in which no change has been made yet.
    settings = ("--epochs", 8, "--rate", 0.05, "--batch", 6, "--rank", RANK, "--views", 1, "--seed", 3,
                "--validation", 0)
    veiltune("train", "--method", "lora", "--backbone", dir, "--data", data, "--cache", work / "cache", "--threads", 1,
             "--out", adapter, *settings)
    what = f"LoRA of {name} to PEFT"
    compare(report, what, loaded(report, what, name, adapter, dir), name, adapter, dir)


def taken_over(report, name, work):
    dir, source, adapter = work / name, work / f"{name}-peft", work / f"{name}-imported"
    torch.manual_seed(11)
    model, (letters, settings) = classifier(name, dir), IMPORTED[name]
    # As this version of transformers calls them.
    parts = {part.rsplit(".", 1)[-1] for part, _ in model.named_modules()}
    targets = [part for letter in letters for part in PROJECTIONS[letter] if part in parts]
    assert len(targets) == len(letters), f"{targets} of {sorted(parts)}"
    config = peft.LoraConfig(r=RANK, target_modules=targets, lora_dropout=0.1, **settings)
    model = peft.get_peft_model(model, config).eval()
    randomise([p for p in model.parameters() if p.requires_grad], 0.2)
    model.save_pretrained(source)
    (work / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    veiltune("import", "--peft", source, "--backbone", dir, "--labels", work / "classes.txt",
             "--images", *sorted((work / "pictures/train").iterdir()), "--out", adapter)
    what = f"LoRA of {name} from PEFT"
    compare(report, what, model, name, adapter, dir)
    what += ", and to PEFT again"
    inputs = pixels(sorted((work / "pictures/test").glob("*/*.png")))
    once, again = (by_peft(m, name, inputs) for m in (model, loaded(report, what, name, adapter, dir)))
    report.close(f"{what}: log-probabilities of PEFT's two models", most(once, again), 1e-9)
    before, after = (set(load_file(at / "adapter_model.safetensors")) for at in (source, adapter))
    report.line(before <= after, f"{what}: {len(before & after)} of {len(before)} tensors have the name that they had")


# Texts.


def causal(dir):
    """A random model of the Llama layout whose words are syllables, with its task and texts: (label, text)."""
    torch.manual_seed(5)
    config = t.LlamaConfig(vocab_size=len(SYLLABLES) + 1, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                           num_key_value_heads=2, intermediate_size=48, max_position_embeddings=ROW,
                           tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = t.LlamaForCausalLM(config)
    randomise(model.parameters(), 0.2)
    model.save_pretrained(dir)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[UNK]", *SYLLABLES])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(dir / "tokenizer.json"))
    task = dict(name="syllables", causal="{prompt} ba {text} be {mask}", verbalizer=dict(a="fi", b="ku", c="mo"))
    random = np.random.default_rng(2)
    text = lambda: " ".join(random.choice(SYLLABLES, random.integers(2, 8)))
    return t.LlamaForCausalLM, task, [("abc"[i % 3], text()) for i in range(60)]


def masked(dir):
    """The embedded BERT, with its task and texts that fit."""
    for file in "config.json", "model.safetensors", "tokenizer.json":
        (dir / file).write_bytes((DEMO / file).read_bytes())
    words = Tokenizer.from_file(str(dir / "tokenizer.json"))
    lines = [line.split("\t") for line in (DEMO / "test.tsv").read_text().splitlines()]
    texts = [(label, text) for text, label in lines if len(words.encode(text, add_special_tokens=False)) <= 18]
    return t.BertForMaskedLM, json.loads((DEMO / "task.json").read_text()), texts


class Reader:
    """Runs a task's template on a model with a prompt that PEFT loaded, as docs/tuning.md says."""

    def __init__(self, model, dir, task, family, mode):
        self.model, self.words, self.mode = model, Tokenizer.from_file(str(dir / "tokenizer.json")), mode
        self.family, self.template = family, task[family]
        self.answers = [self.ids(task["verbalizer"][label])[0] for label in sorted(task["verbalizer"])]
        initial = self.ids(INITIAL)
        self.initial = [initial[i % len(initial)] for i in range(TOKENS)]

    def ids(self, text):
        return self.words.encode(text, add_special_tokens=False).ids

    def pieces(self, text):
        """Tokens before the prompt, those after it, and at which of these the answer is read."""
        before, after, answer = [], [], None
        if self.family == "masked":
            before.append(self.words.token_to_id("[CLS]"))
        side = before
        for piece in re.findall(r"\{\w+\}|[^{}]+", self.template):
            if piece == "{prompt}":
                side = after
            elif piece == "{mask}":
                answer = len(after) - (self.family == "causal")
                side += [self.words.token_to_id("[MASK]")] * (self.family == "masked")
            else:
                side += self.ids(text if piece == "{text}" else piece)
        if self.family == "masked":
            after.append(self.words.token_to_id("[SEP]"))
        return before, after, answer

    def logits(self, texts, prompt=None):
        """Of the label words; with `prompt` instead of the one that was loaded."""
        rows = [self.pieces(text) for text in texts]
        # Padding behind the prompt brings all answers to one position, as veiltune lays out the texts of a run.
        last = max(answer for _, _, answer in rows)
        pads = [last - answer for _, _, answer in rows]
        after = torch.tensor([[0] * pad + after for pad, (_, after, _) in zip(pads, rows)])
        keep = torch.tensor([[0] * pad + [1] * (after.shape[1] - pad) for pad in pads])
        before = torch.tensor([before for before, _, _ in rows], dtype=torch.long)
        count, first = before.shape
        assert first + TOKENS + after.shape[1] <= ROW
        with torch.no_grad():
            if self.family == "causal" and self.mode == "concatenate" and prompt is None:
                assert first == 0
                every = self.model(input_ids=after, attention_mask=keep).logits
            else:
                every = self.at_first_layer(before, after, keep, self.prompt() if prompt is None else prompt)
        return every[:, first + TOKENS + last, self.answers].double()

    def at_first_layer(self, before, after, keep, prompt):
        """All logits with `prompt` in what enters the first layer: behind an encoder's norm of embedded words."""
        base, (count, first) = self.model.get_base_model(), before.shape
        end = first + TOKENS
        def put(_, args, out):
            slot = prompt + out[:, first:end] if self.mode == "add" else prompt.expand(count, -1, -1)
            return torch.cat([out[:, :first], slot, out[:, end:]], 1)
        module = base.base_model.embeddings if self.family == "masked" else base.get_input_embeddings()
        hook = module.register_forward_hook(put)
        ids = torch.cat([before, torch.tensor(self.initial).expand(count, -1), after], 1)
        every = base(input_ids=ids, attention_mask=torch.cat([torch.ones(count, end, dtype=torch.long), keep], 1)).logits
        hook.remove()
        return every

    def prompt(self):
        with torch.no_grad():
            return self.model.get_prompt(batch_size=1)[0]

    def loss(self, examples, labels, prompt=None):
        logits = self.logits([text for _, text in examples], prompt)
        return torch.nn.functional.cross_entropy(logits, torch.tensor([labels.index(l) for l, _ in examples])).item()


def write_texts(path, examples):
    path.write_text("".join(f"{text}\t{label}\n" for label, text in examples))


def prompts(report, family, mode, work):
    dir, what = work / family, f"prompt of a {family} model, mode {mode}, to PEFT"
    dir.mkdir(exist_ok=True)
    cls, task, examples = globals()[family](dir)
    labels, width = sorted(task["verbalizer"]), cls.from_pretrained(dir).config.hidden_size
    (work / f"{family}.json").write_text(json.dumps(task))
    differences, effects, right, total, answered = [], {}, 0, 0, set()
    for seed in range(3):
        # Two texts of each label to tune on, which are all in the file; the others to be labelled.
        chosen = [e for l in labels for e in [e for e in examples if e[0] == l][2 * seed : 2 * seed + 2]]
        others = [e for e in examples if e not in chosen][:MEASURED]
        out, data, test = work / f"{family}-{mode}-{seed}", work / "data.tsv", work / "test.tsv"
        write_texts(data, chosen)
        command = ["tune", "--model", dir, "--task", work / f"{family}.json", "--data", data, "--mode", mode,
                   "--initial-text", INITIAL, "--prompt-tokens", TOKENS, "--tokens", ROW, "--shots", 2,
                   "--validation-shots", 0, "--budget", 200, "--dimension", 20, "--seed", seed, "--output", out, "--json"]
        veiltune(*command)
        stored = peft.load_peft_weights(str(out), device="cpu")
        model = peft.PeftModel.from_pretrained(cls.from_pretrained(dir).float().eval(), out)
        reader = Reader(model, dir, task, family, mode)
        shapes = {name: tuple(v.shape) for name, v in stored.items()}
        # The embedding that PEFT would make anew is random.
        if shapes != {"prompt_embeddings": (TOKENS, width)}:
            raise RuntimeError(f"PEFT loads {shapes}")
        if not torch.equal(reader.prompt(), stored["prompt_embeddings"]):
            raise RuntimeError("PEFT's prompt is not the one in the file")
        # What the best prompt was measured to have on the texts.
        ours = json.loads((out / "checkpoint.json").read_text())["state"]["best"]["score"]["loss"]
        theirs = reader.loss(chosen, labels)
        differences.append(abs(ours - theirs))
        texts = [text for _, text in chosen]
        whole, end = reader.prompt(), torch.eye(TOKENS)[-1:].T
        changes = {"set to zero": 0 * whole, "without its last token": whole * (1 - end)}
        if (family, mode) != ("masked", "concatenate"):
            # There its tokens have no positions, and so no order.
            changes["reversed"] = whole.flip(0)
        for name, other in changes.items():
            effects.setdefault(name, []).append(most(reader.logits(texts, other), reader.logits(texts)))
        # PEFT's answers as labels: the same command measures how many are veiltune's.
        answers = [labels[i] for i in reader.logits([text for _, text in others]).argmax(-1)]
        write_texts(test, [(answer, text) for answer, (_, text) in zip(answers, others)])
        right += round(json.loads(veiltune(*command, "--test", test))["tuned_test"] * len(others))
        total += len(others)
        answered |= set(answers)
    # One answer to all texts would say nothing.
    good = right == total and len(answered) > 1
    text = f"; {right} of {total} labels are the same, of {len(answered)} kinds"
    report.close(f"{what}: losses of {len(differences)} prompts", np.max(differences), FLOAT, good, text)
    for name, values in effects.items():
        report.matters(f"the prompt {name}", values)


def main():
    print(f"transformers {t.__version__}, peft {peft.__version__}, torch {torch.__version__}")
    report = Report()
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        pictures(work / "pictures")
        for seed, name in enumerate(VISION):
            (work / name).mkdir()
            backbone(name, seed, work / name)
        for name in VISION:
            report.run(f"LoRA of {name} to PEFT", exported, name, work)
        for name in IMPORTED:
            report.run(f"LoRA of {name} from PEFT", taken_over, name, work)
        for family in "causal", "masked":
            for mode in "concatenate", "add":
                report.run(f"prompt of a {family} model, mode {mode}, to PEFT", prompts, family, mode, work)
    if report.failed:
        sys.exit(f"{report.failed} of the checks went wrong")
    print("veiltune and PEFT agree")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    VEILTUNE = sys.argv[1] if len(sys.argv) == 2 else "target/release/veiltune"
    main()
