"""Every op against its reference, torch.compile and other libraries, at a preset's shapes; `-k masked_loss` for one."""


def bench_op(kernel_case, timed):
    kernel_case.check()
    timed(kernel_case)
