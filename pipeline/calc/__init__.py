"""The calculator: parameters, memory and fit from shapes alone, without torch.

| question | file |
|---|---|
| what a model's shapes are, and where they are read | `architecture.py`, `families/`, `sources/` |
| what a fine-tuning method is to the calculator | `method.py` |
| what LoRA, QLoRA and DoRA add to a step | class `Lora` in `stages/methods/lora.py` |
| what a base in 4 bits takes (QLoRA: `nf4-dq`) | `settings.py` |
| what another method adds | `COUNTED` in its file in `stages/methods/` |
| which options a step has | `settings.py` |
| how much memory a step takes, part by part | `memory.py`, over `step/` |
| what a block saves, copies and frees | `step/layers.py`, `step/attention.py`, `step/feed_forward.py`, `tape.py` |
| what fits a GPU, and what to change | `fit.py` |
| how long a run takes, on one GPU or several | `time.py`, `parallel.py` |
| what `lora calc` and the terminal UI show | `report.py` |
"""
