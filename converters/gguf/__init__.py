"""Read GGUF, the format of llama.cpp's models, and rebuild what lies beside them.

    header          the fields and the tensors' extents, checked
    types           the types of tensors: bytes, and codes
    blocks          blocks of codes to the codes and grids of a table's rows
    names           tensors' Hugging Face names, by architecture
    model_config    config.json
    vocabulary      the fields of a tokenizer, checked, and llama.cpp's defaults
    tokenizer       tokenizer.json and tokenizer_config.json
    sampling        generation_config.json
    source          a file, or all parts of one, as a source

Source: github.com/ggml-org/ggml, docs/gguf.md.
"""
