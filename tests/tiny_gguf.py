"""The smallest file that llama.cpp loads, with any tokenizer: one block of random weights."""

import gguf
import numpy

WIDTH = 32


def write(path, size, add):
    """Write a Llama of ``size`` tokens; ``add`` adds the tokenizer to the writer, and its result is returned."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(size)
    added = add(writer)
    generator = numpy.random.default_rng(0)
    square = [
        f"blk.0.{name}" for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    ]
    shapes = {"token_embd": (size, WIDTH)} | dict.fromkeys(square, (WIDTH, WIDTH))
    shapes |= dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), (WIDTH,))
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return added
