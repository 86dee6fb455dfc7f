"""Are models from Hugging Face folders computed as they should be?"""
