"""Hugging Face folders in and out: Llama, Mistral, Qwen, Gemma and GPT-2.

    folder = lepton.hub.open("Llama-3.2-1B")
    trainer = lepton.Trainer(
        model=folder.model,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adamw,
        learning_rate=1e-5,
        train=(tokens, next_tokens),
    )
    folder.load_into(trainer)
    trainer.fit(steps=100)
    lepton.hub.save(trainer, "tuned", like=folder)

Nothing is looked up in a network, and no code of a folder is run. What a folder says
and this does not understand is an error.
"""

from lepton_jax.hub.folder import HubFolder
from lepton_jax.hub.folder import open_folder as open
from lepton_jax.hub.writing import save

__all__ = ["HubFolder", "open", "save"]
