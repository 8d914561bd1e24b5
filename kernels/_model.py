"""What the model's definition fixes for mlp_fast and its kernels alike: AdamW's constants, forms of the first layer."""

BETA1, BETA2 = 0.9, 0.999
EPS = 1e-8

FORMS = ("auto", "gather", "table")  # in the order of FORM_* in csrc/train_step.c


def choose_form(form: str, B: int, V: int) -> str:
    """The form to use: `table` while V < B, where a table of V rows costs less than B rows, else `gather`.

    Raises:
        ValueError: the form is not one of auto, gather, table.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}: choose one of {', '.join(FORMS)}")
    if form != "auto":
        return form
    return "table" if V < B else "gather"
