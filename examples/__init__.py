"""What a user copies: `image_classification` (the paper), `transformer_moe` (language models), `what_it_does` (one picture)."""
