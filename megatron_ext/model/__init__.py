"""The network: megatron-core's GPTModel with layers that need no compiled extension.

    RunConfig -> run_config.transformer_config -> layers.decoder_spec -> gpt.build_model ->
    initialise -> DDP

Nothing here moves tokens between ranks by itself; megatron-core's parallel linear layers do.
"""
