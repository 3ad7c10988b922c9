"""Context: conversations that never outgrow the window of the model that answers."""
