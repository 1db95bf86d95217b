"""Being told to stop: hearing the signal, deciding what can still be saved, agreeing on the last step."""
