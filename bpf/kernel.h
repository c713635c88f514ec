/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
 *
 * What the programs need of the kernel, declared by ourselves: with neither vmlinux.h nor libbpf's headers the objects
 * come out the same on every machine that has the pinned clang.
 *
 * Three kinds of names:
 *   - the stable ABI of <linux/bpf.h> (contexts, helper numbers, flags) under the names it has there;
 *   - kernel structures, read through CO-RE: only the members we read, in any order, the loader finds the real
 *     offsets in the running kernel's BTF. The suffix ___klamm is ignored by that search and keeps our names apart
 *     from the kernel's;
 *   - ours: klamm_*.
 */
#pragma once

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef int __s32;
typedef unsigned long long __u64;

struct socket___klamm;

#define NULL ((void *)0)
#define SEC(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))

/* The members of a map definition (BTF style): a number is the length of an array, a type is what is pointed to. */
#define MAP_NUMBER(name, number) int (*name)[number]
#define MAP_TYPE(name, type) typeof(type) *name

#define klamm_be16(x) __builtin_bswap16(x)
#define klamm_be32(x) __builtin_bswap32(x)

/* A context is no plain memory: each field must be read from the context pointer itself at a constant offset. The
 * barrier keeps the compiler from merging the reads of two branches into one from a computed pointer, which the
 * verifier refuses ("dereference of modified ctx ptr"). */
#define CTX(field)                                             \
	({                                                     \
		typeof(field) value_ = *(volatile typeof(field) *)&(field); \
		asm volatile("" : "+r"(value_) : : "memory");  \
		value_;                                        \
	})

/* <linux/bpf.h> ----------------------------------------------------------------------------------------------------- */

enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_LRU_HASH = 9,
	BPF_MAP_TYPE_LPM_TRIE = 11,
	BPF_MAP_TYPE_SK_STORAGE = 24,
	BPF_MAP_TYPE_RINGBUF = 27,
};

enum {
	BPF_ANY = 0,
	BPF_NOEXIST = 1,
	BPF_F_NO_PREALLOC = 1,
	BPF_SK_STORAGE_GET_F_CREATE = 1,
	BPF_F_CURRENT_NETNS = -1,
};

enum {
	BPF_SOCK_OPS_TCP_CONNECT_CB = 3,
	BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB = 5,
	BPF_SOCK_OPS_STATE_CB = 10,
	BPF_SOCK_OPS_STATE_CB_FLAG = 1 << 2,
};

struct bpf_sock {
	__u32 bound_dev_if;
	__u32 family;
	__u32 type;
	__u32 protocol;
	__u32 mark;
	__u32 priority;
	__u32 src_ip4;    /* network order */
	__u32 src_ip6[4]; /* network order */
	__u32 src_port;   /* host order */
	__u16 dst_port;   /* network order */
	__u16 pad;
	__u32 dst_ip4;
	__u32 dst_ip6[4];
	__u32 state;
};

struct __sk_buff {
	__u32 len;
	__u32 pkt_type;
	__u32 mark;
	__u32 queue_mapping;
	__u32 protocol; /* network order, in the low 16 bits */
	__u32 vlan_present;
	__u32 vlan_tci;
	__u32 vlan_proto;
	__u32 priority;
	__u32 ingress_ifindex;
	__u32 ifindex;
	__u32 tc_index;
	__u32 cb[5];
	__u32 hash;
	__u32 tc_classid;
	__u32 data;
	__u32 data_end;
	__u32 napi_id;
	__u32 family;
	__u32 remote_ip4;
	__u32 local_ip4;
	__u32 remote_ip6[4];
	__u32 local_ip6[4];
	__u32 remote_port;
	__u32 local_port;
	__u32 data_meta;
	__u64 flow_keys;
	__u64 tstamp;
	__u32 wire_len;
	__u32 gso_segs;
	struct bpf_sock *sk;
	__u32 gso_size;
};

struct bpf_sock_tuple {
	union {
		struct {
			__u32 saddr, daddr;
			__u16 sport, dport;
		} ipv4;
		struct {
			__u32 saddr[4], daddr[4];
			__u16 sport, dport;
		} ipv6;
	};
};

struct bpf_sock_addr {
	__u32 user_family;
	__u32 user_ip4;    /* network order */
	__u32 user_ip6[4]; /* network order */
	__u32 user_port;   /* network order, in the low 16 bits */
	__u32 family;
	__u32 type;
	__u32 protocol;
	__u32 msg_src_ip4;
	__u32 msg_src_ip6[4];
	struct bpf_sock *sk __attribute__((aligned(8)));
};

struct bpf_sock_ops {
	__u32 op;
	__u32 args[4];
	__u32 family;
	__u32 remote_ip4;    /* network order */
	__u32 local_ip4;     /* network order */
	__u32 remote_ip6[4]; /* network order */
	__u32 local_ip6[4];  /* network order */
	__u32 remote_port;   /* network order of 32 bits */
	__u32 local_port;    /* host order */
	__u32 is_fullsock;
	__u32 snd_cwnd;
	__u32 srtt_us;
	__u32 bpf_sock_ops_cb_flags;
	__u32 state;
	__u32 rtt_min;
	__u32 snd_ssthresh;
	__u32 rcv_nxt;
	__u32 snd_nxt;
	__u32 snd_una;
	__u32 mss_cache;
	__u32 ecn_flags;
	__u32 rate_delivered;
	__u32 rate_interval_us;
	__u32 packets_out;
	__u32 retrans_out;
	__u32 total_retrans;
	__u32 segs_in;
	__u32 data_segs_in;
	__u32 segs_out;
	__u32 data_segs_out;
	__u32 lost_out;
	__u32 sacked_out;
	__u32 sk_txhash;
	__u64 bytes_received;
	__u64 bytes_acked;
	struct bpf_sock *sk;
};

/* Helpers, by the number they have in enum bpf_func_id. Behind each: the kernel which lets our program types call it. */
static void *(*const bpf_map_lookup_elem)(const void *map, const void *key) = (void *)1;
static long (*const bpf_map_update_elem)(void *map, const void *key, const void *value, __u64 flags) = (void *)2;
static long (*const bpf_map_delete_elem)(void *map, const void *key) = (void *)3;
static __u64 (*const bpf_get_current_pid_tgid)(void) = (void *)14;
static __u64 (*const bpf_get_current_uid_gid)(void) = (void *)15;
static long (*const bpf_get_current_comm)(void *comm, __u32 size) = (void *)16;
static __u64 (*const bpf_get_current_task)(void) = (void *)35;     /* 5.10 */
static long (*const bpf_skb_load_bytes)(const void *skb, __u32 offset, void *to, __u32 size) = (void *)26;
static __u64 (*const bpf_get_socket_cookie)(void *ctx) = (void *)46;
static long (*const bpf_setsockopt)(void *ctx, int level, int name, void *value, int size) = (void *)49;
static long (*const bpf_sock_ops_cb_flags_set)(struct bpf_sock_ops *ctx, int flags) = (void *)59;
static __u64 (*const bpf_skb_cgroup_id)(void *skb) = (void *)79;
static __u64 (*const bpf_skb_ancestor_cgroup_id)(void *skb, int level) = (void *)83;
static void (*const bpf_sk_release)(void *sk) = (void *)86;
static struct bpf_sock *(*const bpf_sk_fullsock)(struct bpf_sock *sk) = (void *)95;
static struct bpf_sock *(*const bpf_skc_lookup_tcp)(void *ctx, struct bpf_sock_tuple *tuple, __u32 size, __u64 netns,
						     __u64 flags) = (void *)99; /* 5.2 */
static __u64 (*const bpf_get_current_cgroup_id)(void) = (void *)80;
static void *(*const bpf_sk_storage_get)(void *map, void *sk, void *value, __u64 flags) = (void *)107; /* 5.9 */
static long (*const bpf_sk_storage_delete)(void *map, void *sk) = (void *)108;
static long (*const bpf_probe_read_kernel)(void *to, __u32 size, const void *from) = (void *)113; /* 5.10 */
static __u64 (*const bpf_get_netns_cookie)(void *ctx) = (void *)122;                            /* 5.15 in sockops */
static __u64 (*const bpf_get_current_ancestor_cgroup_id)(int level) = (void *)123;
static __u64 (*const bpf_ktime_get_boot_ns)(void) = (void *)125; /* 5.8 */
static long (*const bpf_seq_write)(void *seq, const void *data, __u32 size) = (void *)127;
static void *(*const bpf_ringbuf_reserve)(void *ring, __u64 size, __u64 flags) = (void *)131; /* 5.8 */
static void (*const bpf_ringbuf_submit)(void *data, __u64 flags) = (void *)132;
static struct socket___klamm *(*const bpf_sock_from_file)(void *file) = (void *)162; /* 5.11 */
static int (*const bpf_set_retval)(int retval) = (void *)187; /* 5.18 */

/* The kernel's own structures ---------------------------------------------------------------------------------------- */

#define CORE __attribute__((preserve_access_index))

enum bpf_func_id___klamm {
	BPF_FUNC_set_retval___klamm = 187,
};

struct super_block___klamm {
	__u32 s_dev;
} CORE;

struct inode___klamm {
	unsigned long i_ino;
	struct super_block___klamm *i_sb;
} CORE;

struct file___klamm {
	struct inode___klamm *f_inode;
} CORE;

struct mm_struct___klamm {
	struct file___klamm *exe_file;
} CORE;

struct pid___klamm {
	__u64 ino; /* 6.9: the inode of its pidfs file */
} CORE;

struct ns_common___klamm {
	__u32 inum;
} CORE;

struct net___klamm {
	struct ns_common___klamm ns;
} CORE;

struct nsproxy___klamm {
	struct net___klamm *net_ns;
} CORE;

struct kernfs_node___klamm {
	__u64 id;
} CORE;

struct cgroup___klamm {
	struct kernfs_node___klamm *kn;
} CORE;

struct css_set___klamm {
	struct cgroup___klamm *dfl_cgrp; /* in the one hierarchy of cgroup2 */
} CORE;

struct kid___klamm {
	__u32 val;
} CORE;

struct cred___klamm {
	struct kid___klamm uid, gid;
} CORE;

struct atomic64___klamm {
	__u64 counter;
} CORE;

struct sock_common___klamm {
	struct atomic64___klamm skc_cookie;
} CORE;

struct sock___klamm {
	struct sock_common___klamm __sk_common;
	__u16 sk_protocol;
} CORE;

struct mptcp_sock___klamm {
	struct sock___klamm *first; /* subflow: the one that connect(2) makes */
} CORE;

struct socket___klamm {
	struct sock___klamm *sk;
} CORE;

struct task_struct___klamm {
	__u32 flags;
	__u32 pid, tgid;
	__u64 start_boottime;
	__u64 self_exec_id;
	char comm[16];
	struct task_struct___klamm *group_leader;
	struct mm_struct___klamm *mm;
	struct pid___klamm *thread_pid;
	struct nsproxy___klamm *nsproxy;
	struct css_set___klamm *cgroups;
	struct cred___klamm *real_cred;
} CORE;

#define PF_KTHREAD 0x00200000

struct bpf_iter_meta___klamm {
	void *seq;
};

struct bpf_iter__task___klamm {
	struct bpf_iter_meta___klamm *meta;
	struct task_struct___klamm *task;
};

struct bpf_iter__task_file___klamm {
	struct bpf_iter_meta___klamm *meta;
	struct task_struct___klamm *task;
	__u32 fd;
	void *file __attribute__((aligned(8)));
};

/* READ(p, field) is p->field; 0 where p or the page behind it is gone (the helper clears what it cannot read). */
#define READ(pointer, field)                                                        \
	({                                                                          \
		typeof((pointer)->field) value_;                                    \
		bpf_probe_read_kernel(&value_, sizeof(value_), &(pointer)->field);  \
		value_;                                                             \
	})

/* Decided by the loader, so that the other branch is dead code to the verifier. */
#define HAS_FIELD(field) __builtin_preserve_field_info(field, 2)
#define HAS_ENUM_VALUE(type, value) __builtin_preserve_enum_value(*(typeof(type) *)value, 0)
