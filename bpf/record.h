/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
 *
 * What the kernel side hands to the node: the one place where both agree byte by byte. record.go has the same in Go;
 * a changed layout is a new KLAMM_RECORD_VERSION.
 */
#pragma once

#include "kernel.h"

#define KLAMM_RECORD_VERSION 1

/* A process, as the kernel knows it. Two of them with equal start_boottime, exec_id and pid_inode are the same process
 * running the same program. */
struct klamm_task {
	__u64 start_boottime; /* ns since boot, of the thread group leader */
	__u64 exec_id;        /* grows with every execve */
	__u64 pid_inode;      /* of its pidfs file, never used twice in a boot; 0 before Linux 6.9 */
	__u64 exe_inode;
	__u64 cgroup_id; /* in cgroup2 */
	__u32 exe_dev;   /* s_dev in the kernel's encoding */
	__u32 tgid;
	__u32 uid; /* real ids in the init user namespace */
	__u32 gid;
	char comm[16]; /* of the thread group leader */
};
_Static_assert(sizeof(struct klamm_task) == 72, "record.go mirrors this layout");

/* One connect(2) that was redirected. */
struct klamm_record {
	__u32 version;
	__u32 netns_inum;
	__u64 netns_cookie;
	__u64 client_cookie; /* SO_COOKIE of the client's socket */
	__u64 connect_time;  /* ns since boot */
	struct klamm_task task; /* uid, gid and cgroup_id are those of the connecting thread */
	__u8 daddr[16];         /* where the client wanted to go, v4 as ::ffff:a.b.c.d */
	__u16 dport;            /* host order */
	__u16 family;           /* of the client's socket: 2 AF_INET, 10 AF_INET6 */
	__u32 protocol;
	__u32 tid;
	__u32 ifindex; /* the client's SO_BINDTODEVICE, 0 for none */
	char comm[16]; /* of the connecting thread */
};
_Static_assert(sizeof(struct klamm_record) == 152, "record.go mirrors this layout");

/* A process that has a descriptor of a client's socket. */
struct klamm_holder {
	__u64 socket; /* SO_COOKIE of what connected: for MPTCP that of the first subflow */
	struct klamm_task task;
};
_Static_assert(sizeof(struct klamm_holder) == 80, "record.go mirrors this layout");

/* Something the node is to act on, or to put on record: at most one per network namespace, reason and moment. */
struct klamm_event {
	__u64 netns_cookie;
	__u64 cgroup_id; /* of the socket where a packet was dropped, of the process otherwise */
	__u32 reason;    /* enum klamm_reason; KLAMM_REASONS for a socket made where nobody listens yet */
	__u32 tgid, tid, uid; /* 0 where a packet was dropped: whoever runs then need not have sent it */
	__u8 daddr[16];
	__u32 dport; /* host order */
	__u32 pad;
	char comm[16];
};
_Static_assert(sizeof(struct klamm_event) == 72, "record.go mirrors this layout");

/* What the node sets. */
struct klamm_config {
	__u64 deadline;          /* of the heartbeat, ns since boot: later, the enforcer counts as down */
	__u8 pass_down;          /* on-enforcer-down: pass */
	__u8 pass_unenrolled;    /* on-unenrolled: pass */
	__u8 cut_established;    /* the second line also stops connections that were there before the node */
	__u8 pad[5];
};
_Static_assert(sizeof(struct klamm_config) == 16, "load.go mirrors this layout");
