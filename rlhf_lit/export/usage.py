"""How an exported folder is used by plain transformers and peft, in a few lines of Python for its card."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_lit.export.trained import Trained

_ANSWER = """\
turns = [{"role": "user", "content": "Hello!"}]
prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**prompt, @settings@max_new_tokens=256)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""
# A score is that of the token that closes the answer: white space that a template writes after it is left out.
_SCORE = """\
turns = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello! How can I help?"}]
text, eos = tokenizer.apply_chat_template(turns, tokenize=False), tokenizer.eos_token
text = text.rstrip() if text.rstrip().endswith(eos) else text + eos
tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")
print(float(model(**tokens).logits[0, 0]) + json.load(open(f"{name}/reward.json"))["bias"])
"""


def usage(found: Trained, folder: Path, whole: bool, name: str | None) -> str:
    """Python that loads a folder and answers a turn, or scores an answer.

    Args:
        found: what was exported.
        folder: the export.
        whole: it holds a whole model, no adapter.
        name: of its repository on the hub; None where it is a folder alone.
    """
    config = folder / "config.json"
    own_code = config.is_file() and "auto_map" in json.loads(config.read_text(encoding="utf-8"))
    options = ", trust_remote_code=True" if own_code or (not whole and found.trust_remote_code) else ""
    kind = "SequenceClassification" if found.scorer else "CausalLM"
    package, auto = ("transformers", f"AutoModelFor{kind}") if whole else ("peft", f"AutoPeftModelFor{kind}")
    settings = []
    if whole:
        settings.append('dtype="auto"')
    elif found.scorer:
        settings.append("num_labels=1")
    lines = ["import json", ""] if found.scorer else []
    imports = ["AutoTokenizer"] if found.scorer or whole else ["AutoTokenizer", "GenerationConfig"]
    if whole:
        lines.append(f"from transformers import {', '.join(sorted((auto, *imports)))}")
    else:
        lines += [f"from {package} import {auto}", f"from transformers import {', '.join(imports)}"]
    place = f'name = "{name}"' if name else 'name = "."  # this folder'
    if name and found.scorer:
        lines.insert(2, "from huggingface_hub import hf_hub_download")
    lines += ["", place, f"tokenizer = AutoTokenizer.from_pretrained(name{options})"]
    lines.append(f"model = {auto}.from_pretrained(name{''.join(f', {one}' for one in settings)}{options})")
    if found.scorer:
        file = 'hf_hub_download(name, "reward.json")' if name else 'f"{name}/reward.json"'
        return "\n".join(lines) + "\n" + _SCORE.replace('f"{name}/reward.json"', file)
    # peft's model has its base's generation config, which knows nothing of the tokens that this adapter stops at.
    stops = "" if whole else "generation_config=GenerationConfig.from_pretrained(name), "
    return "\n".join(lines) + "\n" + _ANSWER.replace("@settings@", stops)
