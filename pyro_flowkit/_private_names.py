"""Every private name of another library that the package leans on, with where it is defined.

A new release may drop any of them. ``tests/test_private_names.py`` looks each up in the installed versions, and finds
those that the code uses and this list does not have. Some cost no more than speed where they are gone:
``torch._C._storage_Use_Count`` (``ops/scratch.py``), ``Function._backward_cls`` (what the forward pass kept is then
computed again), what Adam in one call is made of (``training/adam.py``), and ``torch._guards`` with
``torch._subclasses`` (``programs/tracing.py``).
"""

PRIVATE_NAMES: tuple[tuple[str, str], ...] = (
    # Pyro: modules and the param store
    ("pyro.nn.module", "_is_module_local_param_enabled"),
    ("pyro.nn.module", "_Context"),
    ("pyro.nn.PyroModule", "_pyro_set_supermodule"),
    ("pyro.nn.PyroModule.__init__", "_pyro_name"),
    ("pyro.nn.PyroModule.__init__", "_pyro_context"),
    ("pyro.params.param_store.ParamStoreDict.__init__", "_params"),
    ("pyro.params.param_store.ParamStoreDict.__init__", "_param_to_name"),
    ("pyro.params.param_store.ParamStoreDict.__init__", "_constraints"),
    ("pyro.params.param_store", "$$$"),
    # Pyro: guides
    ("pyro.infer.autoguide.guides.AutoContinuous", "_setup_prototype"),
    ("pyro.infer.autoguide.guides.AutoContinuous", "_init_loc"),
    ("pyro.infer.autoguide.guides.AutoContinuous", "_unpack_latent"),
    ("pyro.infer.autoguide.guides.AutoContinuous", "_loc_scale"),
    ("pyro.infer.autoguide.guides.AutoContinuous", "_create_plates"),
    ("pyro.infer.autoguide.guides.AutoContinuous._setup_prototype", "_unconstrained_shapes"),
    ("pyro.infer.autoguide.guides.AutoContinuous._setup_prototype", "_cond_indep_stacks"),
    ("pyro.infer.autoguide.guides.AutoNormal", "_get_loc_and_scale"),
    ("pyro.infer.autoguide.guides.AutoGuide", "_update_master"),
    ("pyro.infer.autoguide.guides.AutoGuide.__init__", "_prototype_frames"),
    # Pyro: handlers, objectives and what they write into sites
    ("pyro.poutine.messenger.Messenger", "_process_message"),
    ("pyro.poutine.messenger.Messenger", "_postprocess_message"),
    ("pyro.poutine.runtime", "_PYRO_STACK"),
    ("pyro.poutine.subsample_messenger", "_pyro_unconstrained_param"),
    ("pyro.poutine.trace_messenger", "_INPUT"),
    ("pyro.poutine.trace_messenger", "_RETURN"),
    ("pyro.primitives", "_deterministic"),
    ("pyro.infer.elbo", "num_particles_vectorized"),
    ("pyro.infer.ELBO", "_get_trace"),
    ("pyro.infer.ELBO", "_get_traces"),
    ("pyro.distributions.MaskedDistribution.__init__", "_mask"),
    # torch: modules
    ("torch.nn.Module", "_apply"),
    ("torch.nn.Module", "_load_from_state_dict"),
    ("torch.nn.Module", "_save_to_state_dict"),
    ("torch.nn.Module", "_non_persistent_buffers_set"),
    ("torch.nn.Module", "_backward_hooks"),
    ("torch.nn.Module", "_backward_pre_hooks"),
    ("torch.nn.Module", "_forward_hooks"),
    ("torch.nn.Module", "_forward_pre_hooks"),
    # torch: optimizers, whose hooks Adam in one call (``training/adam.py``) has to call itself
    ("torch.optim.optimizer", "_global_optimizer_pre_hooks"),
    ("torch.optim.optimizer", "_global_optimizer_post_hooks"),
    ("torch.optim.optimizer", "_optimizer_step_pre_hooks"),
    ("torch.optim.optimizer", "_optimizer_step_post_hooks"),
    # torch: distributions, which are made to be subclassed through these
    ("torch.distributions.Distribution", "_extended_shape"),
    ("torch.distributions.Distribution", "_get_checked_instance"),
    ("torch.distributions.Distribution", "_validate_args"),
    ("torch.distributions.StudentT.__init__", "_chi2"),
    ("torch.distributions.Distribution", "_validate_sample"),
    ("torch.distributions.Distribution.__init__", "_batch_shape"),
    ("torch.distributions.transforms.Transform", "_call"),
    ("torch.distributions.transforms.Transform", "_inverse"),
    # torch: what is going on, and the memory of tensors
    ("torch", "_C"),
    ("torch", "_foreach_add_"),
    ("torch", "_fused_adam_"),
    ("torch", "_guards"),
    ("torch", "_ops"),
    ("torch", "_subclasses"),
    ("torch", "_utils"),
    ("torch._C", "_are_functorch_transforms_active"),
    ("torch._C", "_len_torch_dispatch_stack"),
    ("torch._C", "_storage_Use_Count"),
    ("torch.UntypedStorage", "_cdata"),
    ("torch.Tensor", "_backward_hooks"),
    ("torch.Tensor", "_post_accumulate_grad_hooks"),
    ("torch.Tensor", "_base"),
    ("torch.autograd.forward_ad", "_current_level"),
    ("torch.autograd.Function", "_backward_cls"),
    ("torch._ops.OpOverload.__init__", "_schema"),
    ("torch.ops.aten", "_unsafe_view"),
    ("torch.utils", "_pytree"),
    ("torch.utils", "_python_dispatch"),
    ("torch._utils", "_flatten_dense_tensors"),
    # pandas, whose frames are made to be subclassed through this
    ("pandas.DataFrame", "_constructor"),
    # PyTorch Lightning, where it is installed
    ("lightning.pytorch.core.module.LightningModule.__init__", "_trainer"),
)
