//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// Runs the pure functions of connect.h in the kernel, on the case that the test has put into klamm_the_case.
#include "kernel.h"
#include "connect.h"

struct klamm_case {
	struct klamm_connect connect;  /* in: not normalised; out: normalised */
	enum klamm_reason reason;      /* out */
	struct klamm_address listener; /* out: where it would be sent */
};

struct klamm_case klamm_the_case;

SEC("syscall")
int klamm_test_connect(void *ctx __attribute__((unused)))
{
	struct klamm_case *c = &klamm_the_case;

	klamm_normalise(&c->connect.to);
	c->reason = klamm_decide(&c->connect);
	c->listener = klamm_listener_address(&c->connect.to);
	return 0;
}

char klamm_license[] SEC("license") = "GPL";
