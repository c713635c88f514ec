/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
 *
 * The maps, and what all programs do with them: count, tell the node, look up what is broker-bound.
 */
#pragma once

#include "connect.h"
#include "record.h"

#define REFUSE 0
#define PASS 1

/* The brokers' ports, one bit each: brokers' wherever they are, or at the addresses in klamm_networks only. */
struct klamm_ports {
	__u64 anywhere[65536 / 64];
	__u64 somewhere[65536 / 64];
};

struct {
	MAP_NUMBER(type, BPF_MAP_TYPE_ARRAY);
	MAP_NUMBER(max_entries, 1);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct klamm_ports);
} klamm_ports SEC(".maps");

struct klamm_network {
	__u32 bits; /* of what follows */
	__u32 port; /* host order; matches whole */
	struct klamm_address to;
};

/* Where ports that others use too, such as 443, are a broker's. */
struct {
	MAP_NUMBER(type, BPF_MAP_TYPE_LPM_TRIE);
	MAP_NUMBER(max_entries, 16384);
	MAP_NUMBER(map_flags, BPF_F_NO_PREALLOC);
	MAP_TYPE(key, struct klamm_network);
	MAP_TYPE(value, __u8);
} klamm_networks SEC(".maps");

struct {
	MAP_NUMBER(type, BPF_MAP_TYPE_ARRAY);
	MAP_NUMBER(max_entries, 1);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, struct klamm_config);
} klamm_config SEC(".maps");

struct klamm_listener {
	__u16 port; /* host order */
	__u16 pad;
	__s32 handshakes; /* of its clients in klamm_handshake */
};

/* Of one network namespace, so that it cannot fill the map for all: its root could keep handshakes from ending. */
#define KLAMM_HANDSHAKES 4096

/* By network namespace cookie. */
struct {
	MAP_NUMBER(type, BPF_MAP_TYPE_HASH);
	MAP_NUMBER(max_entries, 65536);
	MAP_NUMBER(map_flags, BPF_F_NO_PREALLOC);
	MAP_TYPE(key, __u64);
	MAP_TYPE(value, struct klamm_listener);
} klamm_enrolled SEC(".maps");

/* Ids of cgroups whose processes are not redirected: brokers on this host. The value counts their connects. */
struct {
	MAP_NUMBER(type, BPF_MAP_TYPE_HASH);
	MAP_NUMBER(max_entries, 1024);
	MAP_NUMBER(map_flags, BPF_F_NO_PREALLOC);
	MAP_TYPE(key, __u64);
	MAP_TYPE(value, __u64);
} klamm_exempt SEC(".maps");

struct klamm_destination {
	__u64 netns_cookie;
	struct klamm_address to;
	__u32 port; /* host order */
	__u32 pad;
};

/* Destinations the node could not reach -> until when they count as down, in ns since boot. Full means that what is down
 * shows as a reset only. */
struct {
	MAP_NUMBER(type, BPF_MAP_TYPE_HASH);
	MAP_NUMBER(max_entries, 4096);
	MAP_NUMBER(map_flags, BPF_F_NO_PREALLOC);
	MAP_TYPE(key, struct klamm_destination);
	MAP_TYPE(value, __u64);
} klamm_down SEC(".maps");

#define KLAMM_STAMP_OWN 1    /* the node's own socket, said so by the node */
#define KLAMM_STAMP_PASSED 2 /* connect4/6 let it go; until its next connect */

/* Who may send to brokers. Only who holds the map can write here, unlike a mark, which CAP_NET_RAW may set. */
struct {
	MAP_NUMBER(type, BPF_MAP_TYPE_SK_STORAGE);
	MAP_NUMBER(map_flags, BPF_F_NO_PREALLOC);
	MAP_TYPE(key, int);
	MAP_TYPE(value, __u8);
} klamm_stamp SEC(".maps");

/* On the client's socket, from connect to its end or its next connect. */
struct {
	MAP_NUMBER(type, BPF_MAP_TYPE_SK_STORAGE);
	MAP_NUMBER(map_flags, BPF_F_NO_PREALLOC);
	MAP_TYPE(key, int);
	MAP_TYPE(value, struct klamm_record);
} klamm_client SEC(".maps");

/* On the accepted socket. */
struct {
	MAP_NUMBER(type, BPF_MAP_TYPE_SK_STORAGE);
	MAP_NUMBER(map_flags, BPF_F_NO_PREALLOC);
	MAP_TYPE(key, int);
	MAP_TYPE(value, struct klamm_record);
} klamm_accepted SEC(".maps");

struct klamm_tuple {
	__u64 netns_cookie;
	struct klamm_address client, server;
	__u32 client_port, server_port; /* host order */
};

/* Between the SYN and the accepted socket. Full means refused (and counted); an LRU would lose somebody else's. */
struct {
	MAP_NUMBER(type, BPF_MAP_TYPE_HASH);
	MAP_NUMBER(max_entries, 65536);
	MAP_NUMBER(map_flags, BPF_F_NO_PREALLOC);
	MAP_TYPE(key, struct klamm_tuple);
	MAP_TYPE(value, struct klamm_record);
} klamm_handshake SEC(".maps");

struct {
	MAP_NUMBER(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	MAP_NUMBER(max_entries, KLAMM_REASONS);
	MAP_TYPE(key, enum klamm_reason);
	MAP_TYPE(value, __u64);
} klamm_counters SEC(".maps");

/* What the node acts on. What does not fit is counted. */
struct {
	MAP_NUMBER(type, BPF_MAP_TYPE_RINGBUF);
	MAP_NUMBER(max_entries, 256 * 1024);
	MAP_TYPE(value, struct klamm_event);
} klamm_events SEC(".maps");

struct klamm_told {
	__u64 of; /* a network namespace's cookie, or a cgroup's id */
	__u64 reason;
};

/* When the node was last told of a reason. Least recently used goes first: at worst it is told
 * again. */
struct {
	MAP_NUMBER(type, BPF_MAP_TYPE_LRU_HASH);
	MAP_NUMBER(max_entries, 16384);
	MAP_TYPE(key, struct klamm_told);
	MAP_TYPE(value, __u64);
} klamm_told SEC(".maps");

/* The following belong to one process of the node and are not pinned: a node that drains while the next one runs has
 * other processes in view. */

/* The thread group ids whose execve the node is to be told of, one bit each: pid_max is at most 4194304. */
struct {
	MAP_NUMBER(type, BPF_MAP_TYPE_ARRAY);
	MAP_NUMBER(max_entries, 4194304 / 64);
	MAP_TYPE(key, __u32);
	MAP_TYPE(value, __u64);
} klamm_watched SEC(".maps");

/* Thread group ids that called execve. What does not fit is counted, and found by the node's next look. */
struct {
	MAP_NUMBER(type, BPF_MAP_TYPE_RINGBUF);
	MAP_NUMBER(max_entries, 64 * 1024);
	MAP_TYPE(value, __u32);
} klamm_executed SEC(".maps");

/* Cookies of the sockets whose holders the node looks for. */
struct {
	MAP_NUMBER(type, BPF_MAP_TYPE_HASH);
	MAP_NUMBER(max_entries, 1024);
	MAP_TYPE(key, __u64);
	MAP_TYPE(value, __u8);
} klamm_sought SEC(".maps");

INLINE int is_watched(__u32 tgid)
{
	__u32 word = tgid / 64;
	const __u64 *bits = bpf_map_lookup_elem(&klamm_watched, &word);

	return bits && *bits >> (tgid % 64) & 1;
}

/* Atomic although per CPU: one task can interrupt another within a program. */
INLINE void count(enum klamm_reason reason)
{
	__u64 *n = bpf_map_lookup_elem(&klamm_counters, &reason);

	if (n)
		__sync_fetch_and_add(n, 1);
}

/* To the verifier of 6.1 a port that was swapped to host order may be any number. The barrier keeps the compiler, which
 * knows better, from dropping the bound. */
INLINE int has_port(const __u64 *set, __u16 port)
{
	__u64 word = port / 64;

	asm volatile("" : "+r"(word));
	return set[word & (65536 / 64 - 1)] >> (port % 64) & 1;
}

INLINE int is_broker(const struct klamm_address *to, __u16 port)
{
	__u32 zero = 0;
	const struct klamm_ports *p = bpf_map_lookup_elem(&klamm_ports, &zero);
	struct klamm_network n = {.bits = 8 * (sizeof(n) - sizeof(n.bits)), .port = port, .to = *to};

	if (!p)
		return 1;
	if (has_port(p->anywhere, port))
		return 1;
	if (!has_port(p->somewhere, port))
		return 0;
	klamm_embedded_v4(&n.to);
	return !!bpf_map_lookup_elem(&klamm_networks, &n);
}

/* One moment: what happens again within it is not worth another event. */
#define KLAMM_MOMENT 50000000 /* ns */

/* Reserves an event, or returns NULL. Compare with NULL at once: the verifier of 6.1 does not remember a comparison that
 * the compiler repeats after other calls, and takes the reservation for lost. */
INLINE struct klamm_event *tell(__u64 of, __u32 reason)
{
	struct klamm_told key = {.of = of, .reason = reason};
	const __u64 *last = bpf_map_lookup_elem(&klamm_told, &key);
	__u64 now = bpf_ktime_get_boot_ns();
	struct klamm_event *e;

	if (last && now - *last < KLAMM_MOMENT)
		return NULL;
	bpf_map_update_elem(&klamm_told, &key, &now, BPF_ANY);
	e = bpf_ringbuf_reserve(&klamm_events, sizeof(*e), 0);
	if (!e) {
		count(KLAMM_EVENT_LOST);
		return NULL;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->reason = reason;
	return e;
}

INLINE void tell_of_process(__u64 netns_cookie, __u32 reason, const struct klamm_address *to, __u16 port)
{
	struct klamm_event *e = tell(netns_cookie, reason);
	__u64 pid_tgid;

	if (!e)
		return;
	pid_tgid = bpf_get_current_pid_tgid();
	e->netns_cookie = netns_cookie;
	e->cgroup_id = bpf_get_current_cgroup_id();
	e->tgid = pid_tgid >> 32;
	e->tid = pid_tgid;
	e->uid = bpf_get_current_uid_gid();
	if (to)
		__builtin_memcpy(e->daddr, to, sizeof(e->daddr));
	e->dport = port;
	bpf_get_current_comm(e->comm, sizeof(e->comm));
	bpf_ringbuf_submit(e, 0);
}

INLINE __u16 listener_port(void *ctx)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	const struct klamm_listener *l = bpf_map_lookup_elem(&klamm_enrolled, &cookie);

	return l ? l->port : 0;
}

/* 0 for a socket that has none. */
INLINE __u8 stamp_of(struct bpf_sock *sk)
{
	const __u8 *stamp = sk ? bpf_sk_storage_get(&klamm_stamp, sk, NULL, 0) : NULL;

	return stamp ? *stamp : 0;
}
