/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
 *
 * Where a packet that leaves a socket is going: read at cgroup_skb/egress, so from the network header on, after the
 * host's own NAT (netfilter's output and postrouting hooks run before) and before it is cut into fragments.
 */
#pragma once

#include "connect.h"

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd

/* RFC 8200, section 4: what may stand between the IPv6 header and TCP. */
#define IPPROTO_HOPOPTS 0
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_ROUTING 43
#define IPPROTO_FRAGMENT 44
#define IPPROTO_AH 51
#define IPPROTO_ICMPV6 58
#define IPPROTO_DSTOPTS 60

#define KLAMM_MAX_EXTENSIONS 8

#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

struct klamm_ip4 {
	__u8 version_length, tos;
	__u16 total, id, fragment;
	__u8 ttl, protocol;
	__u16 checksum;
	__u32 from, to;
};

struct klamm_ip6 {
	__u32 flow;
	__u16 payload;
	__u8 next, hops;
	struct klamm_address from, to;
};

struct klamm_tcp {
	__u16 from, to;
	__u32 sequence, acknowledged;
	__u8 offset, flags;
};

#define KLAMM_TCP_SIZE 14 /* up to the flags; the structure has padding behind */

enum klamm_kind {
	KLAMM_NOT_TCP,
	KLAMM_TCP,
	/* A part of a TCP segment. TCP itself makes none here, so somebody hides a header in the next one. */
	KLAMM_FRAGMENT,
	KLAMM_UNREADABLE,
};

struct klamm_packet {
	struct klamm_address from, to; /* normalised */
	struct klamm_tcp tcp;
};

INLINE enum klamm_kind klamm_read_tcp(struct __sk_buff *skb, struct klamm_packet *p, __u32 at, int fragment)
{
	if (fragment)
		return KLAMM_FRAGMENT;
	return bpf_skb_load_bytes(skb, at, &p->tcp, KLAMM_TCP_SIZE) ? KLAMM_UNREADABLE : KLAMM_TCP;
}

INLINE enum klamm_kind klamm_read_ip4(struct __sk_buff *skb, struct klamm_packet *p)
{
	const void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	const struct klamm_ip4 *plain = data;
	const struct klamm_tcp *tcp = data + sizeof(*plain);
	struct klamm_ip4 ip;

	/* The packets of TCP itself: contiguous, without options, whole. */
	if ((void *)tcp + KLAMM_TCP_SIZE <= end && plain->version_length == 0x45 &&
	    !(plain->fragment & klamm_be16(0x3fff))) {
		if (plain->protocol != IPPROTO_TCP)
			return KLAMM_NOT_TCP;
		klamm_set_v4(&p->from, plain->from);
		klamm_set_v4(&p->to, plain->to);
		__builtin_memcpy(&p->tcp, tcp, KLAMM_TCP_SIZE);
		return KLAMM_TCP;
	}
	if (bpf_skb_load_bytes(skb, 0, &ip, sizeof(ip)))
		return KLAMM_UNREADABLE;
	if (ip.protocol != IPPROTO_TCP)
		return KLAMM_NOT_TCP;
	klamm_set_v4(&p->from, ip.from);
	klamm_set_v4(&p->to, ip.to);
	return klamm_read_tcp(skb, p, (ip.version_length & 0xf) * 4, !!(ip.fragment & klamm_be16(0x3fff)));
}

INLINE enum klamm_kind klamm_read_ip6(struct __sk_buff *skb, struct klamm_packet *p)
{
	struct klamm_ip6 ip;
	__u32 at = sizeof(ip);
	int fragment = 0;
	__u8 next;

	if (bpf_skb_load_bytes(skb, 0, &ip, sizeof(ip)))
		return KLAMM_UNREADABLE;
	p->from = ip.from;
	p->to = ip.to;
	next = ip.next;
	for (int i = 0; i < KLAMM_MAX_EXTENSIONS; i++) {
		struct {
			__u8 next, length;
			__u16 fragment;
		} extension;

		switch (next) {
		case IPPROTO_TCP:
			return klamm_read_tcp(skb, p, at, fragment);
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
		case IPPROTO_AH:
		case IPPROTO_FRAGMENT:
			break;
		default:
			return KLAMM_NOT_TCP;
		}
		if (bpf_skb_load_bytes(skb, at, &extension, sizeof(extension)))
			return KLAMM_UNREADABLE;
		if (next == IPPROTO_FRAGMENT) {
			at += 8;
			/* Behind the first fragment there is no header left to read; what it would be is told of the
			 * first header only. */
			if (extension.fragment & klamm_be16(0xfff8))
				return extension.next == IPPROTO_UDP || extension.next == IPPROTO_ICMPV6 ?
					       KLAMM_NOT_TCP : KLAMM_FRAGMENT;
			fragment = extension.fragment & klamm_be16(1);
		} else if (next == IPPROTO_AH) {
			at += (extension.length + 2) * 4;
		} else {
			at += (extension.length + 1) * 8;
		}
		next = extension.next;
	}
	return KLAMM_UNREADABLE;
}

INLINE enum klamm_kind klamm_read_packet(struct __sk_buff *skb, struct klamm_packet *p)
{
	enum klamm_kind kind = KLAMM_NOT_TCP;

	switch (skb->protocol) {
	case klamm_be16(ETH_P_IP):
		kind = klamm_read_ip4(skb, p);
		break;
	case klamm_be16(ETH_P_IPV6):
		kind = klamm_read_ip6(skb, p);
		break;
	}
	return kind;
}

/* Begins a connection: the first packet of one's own, not the answer to somebody else's. */
INLINE int klamm_begins(const struct klamm_packet *p)
{
	return (p->tcp.flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}
