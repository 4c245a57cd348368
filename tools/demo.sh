#!/usr/bin/env bash
# The main job from data to pictures, each step the command that a user would type.  `make demo` runs it in .venv.
#   tools/demo.sh [--cfg-options of the training, for example train_cfg.max_epochs=4]
# Results: work_dirs/demo, pictures in work_dirs/demo/pictures.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -x .venv/bin/python ]; then PATH="$PWD/.venv/bin:$PATH"; fi
mim() { python -m mim "$@"; }
step() { printf '\n== %s\n' "$*"; }

config=boxer_tiny_shapes.py
work=work_dirs/demo
pictures=$work/pictures
options=()
if [ $# -gt 0 ]; then options=(--cfg-options "$@"); fi
rm -rf "$work"
mkdir -p "$pictures"

step 'Making the dataset: 600 training and 200 unseen validation images of 128 x 128 pixels'
mim run boltz_mm make_shapes --out data/shapes --train 600 --val 200 --size 128 --seed 0

step "Training $config"
mim train boltz_mm $config --work-dir $work ${options[@]+"${options[@]}"}

checkpoint=$(cat $work/last_checkpoint) # the last, not the one that happens to be best on these images
step "Evaluating $checkpoint on the validation images"
mim test boltz_mm $config --checkpoint "$checkpoint" --work-dir $work/test

step "Drawing to $pictures"
mim run boltz_mm plot_detections configs/boxer/$config "$checkpoint" --out $pictures/detections.png
mim run boltz_mm analyze_logs plot_curve $work --out $pictures/curves.png
mim run boltz_mm plot_box_attention configs/boxer/$config "$checkpoint" \
    "$(ls data/shapes/val/*.png | head -n 1)" --out $pictures/attended_boxes.png

step 'Done'
echo "Pictures: $(ls $pictures/*.png | tr '\n' ' ')"
