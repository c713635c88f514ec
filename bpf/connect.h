/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
 *
 * What becomes of a TCP connect(2). Pure: no helper is called and no context is read, so the same lines run under test.
 */
#pragma once

#include "kernel.h"

/* Why a socket passed, was redirected or refused. The index of the counters; counters.go has the names. */
enum klamm_reason {
	KLAMM_PASSED_FOREIGN,
	KLAMM_PASSED_STAMPED,
	KLAMM_PASSED_KERNEL_THREAD,
	KLAMM_PASSED_EXEMPT,
	KLAMM_PASSED_ENFORCER_DOWN,
	KLAMM_PASSED_NOT_ENROLLED,
	KLAMM_REDIRECTED,
	KLAMM_REFUSED_DIRECT,
	KLAMM_REFUSED_NOT_ENROLLED,
	KLAMM_REFUSED_ENFORCER_DOWN,
	KLAMM_REFUSED_DOWN,
	KLAMM_REFUSED_NO_SOCKET,
	KLAMM_REFUSED_NO_STORAGE,
	KLAMM_REFUSED_BOUND_DEVICE,
	KLAMM_REFUSED_BIND,
	KLAMM_HANDSHAKE_BEGUN,
	KLAMM_HANDSHAKE_NO_STATE_CALLBACK,
	KLAMM_HANDSHAKE_NO_ENTRY,
	KLAMM_HANDED_OVER,
	KLAMM_ACCEPTED_WITHOUT_RECORD,
	KLAMM_ACCEPTED_NO_STORAGE,
	KLAMM_DROPPED_EGRESS,
	KLAMM_DROPPED_FRAGMENT,
	KLAMM_DROPPED_UNREADABLE,
	KLAMM_EVENT_LOST,
	KLAMM_REASONS,
};

/* 16 bytes in network order, IPv4 as ::ffff:a.b.c.d, so that there is one decision and not one per family. */
struct klamm_address {
	__u32 word[4];
};

#define KLAMM_V4_PREFIX klamm_be32(0x0000ffff)
#define KLAMM_V4_LOOPBACK klamm_be32(0x7f000001)

INLINE int klamm_is_v4(const struct klamm_address *a)
{
	return !a->word[0] && !a->word[1] && a->word[2] == KLAMM_V4_PREFIX;
}

INLINE void klamm_set_v4(struct klamm_address *a, __u32 v4)
{
	a->word[0] = 0;
	a->word[1] = 0;
	a->word[2] = KLAMM_V4_PREFIX;
	a->word[3] = v4;
}

/* The loopback address of the same family: where the listener of a network namespace is. */
INLINE struct klamm_address klamm_listener_address(const struct klamm_address *a)
{
	struct klamm_address to = {{0, 0, 0, klamm_be32(1)}};

	if (klamm_is_v4(a))
		klamm_set_v4(&to, KLAMM_V4_LOOPBACK);
	return to;
}

/* The address that NAT64's well-known prefix 64:ff9b::/96 (RFC 6052) stands for; others are left as they are. */
INLINE void klamm_embedded_v4(struct klamm_address *a)
{
	if (a->word[0] == klamm_be32(0x0064ff9b) && !a->word[1] && !a->word[2])
		klamm_set_v4(a, a->word[3]);
}

/* Linux takes the unspecified address (0.0.0.0, ::, ::ffff:0.0.0.0) as a destination for loopback. It does so after
 * the connect hook has run, so we have to do it before we decide. */
INLINE void klamm_normalise(struct klamm_address *a)
{
	if (!a->word[0] && !a->word[1] && !a->word[3] && (!a->word[2] || a->word[2] == KLAMM_V4_PREFIX))
		*a = klamm_listener_address(a);
}

INLINE int klamm_is_loopback(const struct klamm_address *a)
{
	if (klamm_is_v4(a))
		return (a->word[3] & klamm_be32(0xff000000)) == klamm_be32(0x7f000000);
	return !a->word[0] && !a->word[1] && !a->word[2] && a->word[3] == klamm_be32(1);
}

INLINE int klamm_is_listener_address(const struct klamm_address *a)
{
	struct klamm_address l = klamm_listener_address(a);

	return a->word[0] == l.word[0] && a->word[1] == l.word[1] && a->word[2] == l.word[2] && a->word[3] == l.word[3];
}

/* All that the decision depends on. */
struct klamm_connect {
	struct klamm_address to; /* normalised */
	__u16 port;              /* host order */
	__u16 listener;          /* of the socket's network namespace, host order; 0: not enrolled */
	__u8 broker;             /* the destination is a broker's */
	__u8 stamped;            /* the node's own socket */
	__u8 kernel_thread;
	__u8 exempt;          /* the process lives in an exempt cgroup, or below one */
	__u8 down;            /* a moment ago the node could not reach it */
	__u8 enforcer_down;   /* the node's heartbeat is over */
	__u8 pass_down;       /* what the configuration says for when it is */
	__u8 pass_unenrolled; /* and for a network namespace without a listener */
};

INLINE enum klamm_reason klamm_decide(const struct klamm_connect *c)
{
	/* Nobody may talk to the listener without a record. Comes first: were the listener's port one of the brokers'
	 * ports too, a redirect to it would make the node dial itself. */
	if (c->listener && c->port == c->listener && klamm_is_loopback(&c->to))
		return KLAMM_REFUSED_DIRECT;
	if (!c->broker)
		return KLAMM_PASSED_FOREIGN;
	if (c->stamped)
		return KLAMM_PASSED_STAMPED;
	if (c->kernel_thread)
		return KLAMM_PASSED_KERNEL_THREAD;
	if (c->exempt)
		return KLAMM_PASSED_EXEMPT;
	/* Asked before the listener: a node that hangs still has one, which nobody would accept from. */
	if (c->enforcer_down)
		return c->pass_down ? KLAMM_PASSED_ENFORCER_DOWN : KLAMM_REFUSED_ENFORCER_DOWN;
	/* No listener there yet. ECONNREFUSED is what every Kafka client retries. */
	if (!c->listener)
		return c->pass_unenrolled ? KLAMM_PASSED_NOT_ENROLLED : KLAMM_REFUSED_NOT_ENROLLED;
	/* A redirected connect succeeds before the broker was reached. Clients act on a refused connect in other ways than
	 * on a connection that is reset, so what is known to be down is refused here. */
	if (c->down)
		return KLAMM_REFUSED_DOWN;
	return KLAMM_REDIRECTED;
}
