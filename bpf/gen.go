package bpf

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -tags linux -cflags "-O2 -mcpu=v3 -Wall -Wextra -Werror" -type klamm_record -type klamm_reason -type klamm_destination -type klamm_event -type klamm_address redirect redirect.bpf.c
