"""How a basis is fitted. Only `fit` differs between the papers; `base` gives the rest."""
