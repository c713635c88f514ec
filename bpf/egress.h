/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
 *
 * The second line: a broker-bound packet of a socket that connect4/6 did not let go, and that the node did not stamp, is
 * dropped.
 */
#pragma once

#include "maps.h"
#include "packet.h"

#define TCP_LISTEN 10

/* By the cgroup the socket was made in: connections older than the node have nothing else to tell them by. */
INLINE int is_exempt_socket(struct __sk_buff *skb)
{
	for (int level = 0; level < 32; level++) {
		__u64 id = bpf_skb_ancestor_cgroup_id(skb, level);

		if (!id)
			return 0;
		if (bpf_map_lookup_elem(&klamm_exempt, &id))
			return 1;
	}
	return 0;
}

/* Whether somebody listens at the packet's source: then a client of his has a broker's port as its own. */
INLINE int is_served(struct __sk_buff *skb, const struct klamm_packet *p)
{
	struct bpf_sock_tuple t = {};
	struct bpf_sock *listener;
	__u32 size = sizeof(t.ipv6);
	int served;

	/* With no source port it finds no connection, only listeners. */
	if (klamm_is_v4(&p->to)) {
		size = sizeof(t.ipv4);
		t.ipv4.saddr = p->to.word[3];
		t.ipv4.daddr = p->from.word[3];
		t.ipv4.dport = p->tcp.from;
	} else {
		__builtin_memcpy(t.ipv6.saddr, &p->to, sizeof(t.ipv6.saddr));
		__builtin_memcpy(t.ipv6.daddr, &p->from, sizeof(t.ipv6.daddr));
		t.ipv6.dport = p->tcp.from;
	}
	listener = bpf_skc_lookup_tcp(skb, &t, size, BPF_F_CURRENT_NETNS, 0);
	if (!listener)
		return 0;
	served = listener->state == TCP_LISTEN;
	bpf_sk_release(listener);
	return served;
}

/* Packets that are not broker-bound leave after one look at a bitmap. */
INLINE int may_leave(struct __sk_buff *skb, const struct klamm_packet *p)
{
	__u32 zero = 0;
	const struct klamm_config *config;
	struct bpf_sock *sk = skb->sk;

	if (!is_broker(&p->to, klamm_be16(p->tcp.to)))
		return 1;
	/* A reset ends what it is sent for and carries nothing: the broker may as well hear that a client is gone. */
	if (p->tcp.flags & TCP_RST)
		return 1;
	if (sk)
		sk = bpf_sk_fullsock(sk);
	if (sk && stamp_of(sk))
		return 1;
	if (is_exempt_socket(skb))
		return 1;
	if (klamm_begins(p))
		return 0;
	/* Not a full socket: the kernel's last acknowledgements for one that is gone. */
	if (!sk)
		return 1;
	config = bpf_map_lookup_elem(&klamm_config, &zero);
	if (config && !config->cut_established)
		return 1;
	return is_served(skb, p);
}

/* Told by cgroup: before 6.15 a program at this hook is not told its network namespace. */
INLINE int drop(struct __sk_buff *skb, const struct klamm_packet *p, enum klamm_reason reason)
{
	__u64 cgroup_id = bpf_skb_cgroup_id(skb);
	struct klamm_event *e;

	count(reason);
	e = tell(cgroup_id, reason);
	if (!e)
		return REFUSE;
	e->cgroup_id = cgroup_id;
	if (reason != KLAMM_DROPPED_UNREADABLE)
		__builtin_memcpy(e->daddr, &p->to, sizeof(e->daddr));
	if (reason == KLAMM_DROPPED_EGRESS)
		e->dport = klamm_be16(p->tcp.to);
	bpf_ringbuf_submit(e, 0);
	return REFUSE;
}

SEC("cgroup_skb/egress")
int klamm_egress(struct __sk_buff *skb)
{
	struct klamm_packet p = {};

	switch (klamm_read_packet(skb, &p)) {
	case KLAMM_NOT_TCP:
		return PASS;
	case KLAMM_TCP:
		return may_leave(skb, &p) ? PASS : drop(skb, &p, KLAMM_DROPPED_EGRESS);
	case KLAMM_FRAGMENT:
		return drop(skb, &p, KLAMM_DROPPED_FRAGMENT);
	case KLAMM_UNREADABLE:
		break;
	}
	return drop(skb, &p, KLAMM_DROPPED_UNREADABLE);
}
