"""What deqjax does on a GPU or TPU; `run` measures it, `compile` needs no device."""
