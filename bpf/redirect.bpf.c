//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// The kernel side of the redirect. One connection passes these programs in this order:
//
//   connect4/6           decides; a broker-bound socket gets a record in its storage and the listener as destination
//   sockops, connect     before the SYN leaves, when the local port is known: record -> handshake, by the 4-tuple
//   sockops, established the accepted socket: handshake -> its storage, where the node finds it by the socket's fd
//   sockops, closed      a client that never got through takes its handshake entry along
//   getpeername4/6       tells the client the address it asked for
//
// Every entry dies with its socket or within the handshake, so nothing is evicted and nothing is swept.
//
// Two more stand beside that way:
//
//   sock_create          tells the node of a network namespace in which it does not listen yet
//   egress               the second line: a broker-bound packet of a socket that connect4/6 did not let go is dropped
//
// The rest tells what becomes of the processes behind connections: iterators that the node runs when it wants to know,
// and a tracepoint for what it has to know at once.
#include "kernel.h"
#include "connect.h"
#include "egress.h"
#include "maps.h"
#include "record.h"

/* Helpers that read kernel memory are for GPL programs only, so this half is loaded under that of its two licences. */
char klamm_license[] SEC("license") = "GPL";

#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1
#define IPPROTO_MPTCP 262
#define SOL_SOCKET 1
#define SO_BINDTODEVICE 25
#define TCP_CLOSE 7
#define ECONNREFUSED 111

INLINE int is_down(void *ctx, const struct klamm_connect *c)
{
	struct klamm_destination d = {.netns_cookie = bpf_get_netns_cookie(ctx), .to = c->to, .port = c->port};
	const __u64 *until = bpf_map_lookup_elem(&klamm_down, &d);

	return until && bpf_ktime_get_boot_ns() < *until;
}

/* By the process that connects, not by the cgroup its socket was made in: a socket handed over by an exempt process
 * does not carry the exemption along. An exemption deeper than 32 levels is not found, and the process is redirected. */
INLINE int is_exempt(void)
{
	for (int level = 0; level < 32; level++) {
		__u64 id = bpf_get_current_ancestor_cgroup_id(level), *connects;

		if (!id)
			return 0;
		connects = bpf_map_lookup_elem(&klamm_exempt, &id);
		if (connects) {
			__sync_fetch_and_add(connects, 1);
			return 1;
		}
	}
	return 0;
}

/* What the whole process has. running is any thread of it: its leader may have ended and have no memory any more. */
INLINE void read_process(struct klamm_task *to, struct task_struct___klamm *leader, struct task_struct___klamm *running)
{
	struct inode___klamm *exe = READ(READ(READ(running, mm), exe_file), f_inode);
	struct pid___klamm *pid = READ(leader, thread_pid);

	to->start_boottime = READ(leader, start_boottime);
	to->exec_id = READ(leader, self_exec_id);
	to->pid_inode = HAS_FIELD(pid->ino) ? READ(pid, ino) : 0;
	to->exe_inode = READ(exe, i_ino);
	to->exe_dev = READ(READ(exe, i_sb), s_dev);
	bpf_probe_read_kernel(to->comm, sizeof(to->comm), &leader->comm);
}

INLINE void write_record(struct klamm_record *r, struct bpf_sock_addr *ctx, const struct klamm_connect *c, __u16 family,
			 __u32 ifindex)
{
	struct task_struct___klamm *task = (void *)bpf_get_current_task();
	__u64 pid_tgid = bpf_get_current_pid_tgid(), uid_gid = bpf_get_current_uid_gid();

	read_process(&r->task, READ(task, group_leader), task);
	r->task.cgroup_id = bpf_get_current_cgroup_id();
	r->task.tgid = pid_tgid >> 32;
	r->task.uid = uid_gid;
	r->task.gid = uid_gid >> 32;
	r->version = KLAMM_RECORD_VERSION;
	r->netns_inum = READ(READ(READ(task, nsproxy), net_ns), ns.inum);
	r->netns_cookie = bpf_get_netns_cookie(ctx);
	r->client_cookie = bpf_get_socket_cookie(ctx);
	r->connect_time = bpf_ktime_get_boot_ns();
	__builtin_memcpy(r->daddr, &c->to, sizeof(r->daddr));
	r->dport = c->port;
	r->family = family;
	r->protocol = ctx->protocol;
	r->tid = pid_tgid;
	r->ifindex = ifindex;
	bpf_get_current_comm(r->comm, sizeof(r->comm));
}

/* Makes the socket ready to be sent to the listener; any reason but KLAMM_REDIRECTED refuses it. */
INLINE enum klamm_reason prepare(struct bpf_sock_addr *ctx, const struct klamm_connect *c, __u16 family)
{
	struct bpf_sock *sk = ctx->sk;
	struct klamm_record *r;
	__u32 ifindex;
	char none = 0;

	if (!sk)
		return KLAMM_REFUSED_NO_SOCKET;
	/* Bound to a device, the SYN to loopback would leave by that device and never come back. */
	ifindex = sk->bound_dev_if;
	if (ifindex && bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTODEVICE, &none, sizeof(none)))
		return KLAMM_REFUSED_BOUND_DEVICE;
	/* Counts against the socket's option memory (net.core.optmem_max), so it may fail. */
	r = bpf_sk_storage_get(&klamm_client, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!r)
		return KLAMM_REFUSED_NO_STORAGE;
	write_record(r, ctx, c, family, ifindex);
	return KLAMM_REDIRECTED;
}

/* What matters for broker-bound connects only. */
INLINE void look_closer(struct bpf_sock_addr *ctx, struct klamm_connect *c)
{
	struct task_struct___klamm *task = (void *)bpf_get_current_task();
	__u32 zero = 0;
	const struct klamm_config *config = bpf_map_lookup_elem(&klamm_config, &zero);

	c->stamped = stamp_of(ctx->sk) == KLAMM_STAMP_OWN;
	c->kernel_thread = !!(READ(task, flags) & PF_KTHREAD);
	if (!c->stamped && !c->kernel_thread)
		c->exempt = is_exempt();
	c->down = is_down(ctx, c);
	c->enforcer_down = 1;
	if (config) {
		c->enforcer_down = bpf_ktime_get_boot_ns() > config->deadline;
		c->pass_down = config->pass_down;
		c->pass_unenrolled = config->pass_unenrolled;
	}
}

INLINE int is_passed(enum klamm_reason reason) { return reason <= KLAMM_PASSED_NOT_ENROLLED; }

/* Tells the second line whether connect let the socket go to a broker. Where there is no memory for it, the second line
 * knows the exempt ones by their cgroup, and drops the others. */
INLINE void let_go(struct bpf_sock *sk, int passed)
{
	__u8 *stamp = bpf_sk_storage_get(&klamm_stamp, sk, NULL, passed ? BPF_SK_STORAGE_GET_F_CREATE : 0);

	if (stamp && *stamp != KLAMM_STAMP_OWN)
		*stamp = passed ? KLAMM_STAMP_PASSED : 0;
}

/* Fills the rest of c (to and port are given) and decides. Looks up only what this destination needs: most connects
 * are neither broker-bound nor to loopback. */
INLINE enum klamm_reason on_connect(struct bpf_sock_addr *ctx, struct klamm_connect *c, __u16 family)
{
	struct bpf_sock *sk = ctx->sk;
	enum klamm_reason reason;

	klamm_normalise(&c->to);
	c->broker = is_broker(&c->to, c->port);
	if (c->broker || klamm_is_loopback(&c->to))
		c->listener = listener_port(ctx);
	if (c->broker)
		look_closer(ctx, c);
	reason = klamm_decide(c);
	if (reason == KLAMM_REDIRECTED)
		reason = prepare(ctx, c, family);
	/* A socket may connect again after connect(AF_UNSPEC): what it was before no longer holds. */
	if (reason != KLAMM_REDIRECTED && sk)
		bpf_sk_storage_delete(&klamm_client, sk);
	if (sk && reason != KLAMM_PASSED_STAMPED)
		let_go(sk, is_passed(reason) && c->broker);
	count(reason);
	if (reason >= KLAMM_PASSED_ENFORCER_DOWN && reason != KLAMM_REDIRECTED)
		tell_of_process(bpf_get_netns_cookie(ctx), reason, &c->to, c->port);
	return reason;
}

/* Before 5.18 a program cannot choose the error and the client sees EPERM. */
INLINE int refuse(void)
{
	if (HAS_ENUM_VALUE(enum bpf_func_id___klamm, BPF_FUNC_set_retval___klamm))
		bpf_set_retval(-ECONNREFUSED);
	return REFUSE;
}

INLINE int is_tcp(__u32 type, __u32 protocol)
{
	return type == SOCK_STREAM && (protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP);
}

SEC("cgroup/connect4")
int klamm_connect4(struct bpf_sock_addr *ctx)
{
	struct klamm_connect c = {.port = klamm_be16(CTX(ctx->user_port))};
	enum klamm_reason reason;

	if (!is_tcp(CTX(ctx->type), CTX(ctx->protocol)))
		return PASS;
	klamm_set_v4(&c.to, CTX(ctx->user_ip4));
	reason = on_connect(ctx, &c, AF_INET);
	if (is_passed(reason))
		return PASS;
	if (reason != KLAMM_REDIRECTED)
		return refuse();
	ctx->user_ip4 = KLAMM_V4_LOOPBACK;
	ctx->user_port = klamm_be16(c.listener);
	return PASS;
}

SEC("cgroup/connect6")
int klamm_connect6(struct bpf_sock_addr *ctx)
{
	struct klamm_connect c = {.port = klamm_be16(CTX(ctx->user_port))};
	enum klamm_reason reason;
	struct klamm_address to;

	if (!is_tcp(CTX(ctx->type), CTX(ctx->protocol)))
		return PASS;
	c.to.word[0] = CTX(ctx->user_ip6[0]);
	c.to.word[1] = CTX(ctx->user_ip6[1]);
	c.to.word[2] = CTX(ctx->user_ip6[2]);
	c.to.word[3] = CTX(ctx->user_ip6[3]);
	reason = on_connect(ctx, &c, AF_INET6);
	if (is_passed(reason))
		return PASS;
	if (reason != KLAMM_REDIRECTED)
		return refuse();
	to = klamm_listener_address(&c.to);
	ctx->user_ip6[0] = to.word[0];
	ctx->user_ip6[1] = to.word[1];
	ctx->user_ip6[2] = to.word[2];
	ctx->user_ip6[3] = to.word[3];
	ctx->user_port = klamm_be16(c.listener);
	return PASS;
}

INLINE struct klamm_record *client_record(struct bpf_sock *sk)
{
	return sk ? bpf_sk_storage_get(&klamm_client, sk, NULL, 0) : NULL;
}

SEC("cgroup/getpeername4")
int klamm_getpeername4(struct bpf_sock_addr *ctx)
{
	const struct klamm_record *r = client_record(ctx->sk);
	struct klamm_address to;

	if (!r)
		return PASS;
	__builtin_memcpy(&to, r->daddr, sizeof(to));
	ctx->user_ip4 = to.word[3];
	ctx->user_port = klamm_be16(r->dport);
	return PASS;
}

SEC("cgroup/getpeername6")
int klamm_getpeername6(struct bpf_sock_addr *ctx)
{
	const struct klamm_record *r = client_record(ctx->sk);
	struct klamm_address to;

	if (!r)
		return PASS;
	__builtin_memcpy(&to, r->daddr, sizeof(to));
	ctx->user_ip6[0] = to.word[0];
	ctx->user_ip6[1] = to.word[1];
	ctx->user_ip6[2] = to.word[2];
	ctx->user_ip6[3] = to.word[3];
	ctx->user_port = klamm_be16(r->dport);
	return PASS;
}

/* Who binds the listener's address and port would be handed the clients while the node is away. Addresses to which no
 * redirect goes are free: bind(port 0) of somebody else may well be given our port there. */
INLINE int on_bind(struct bpf_sock *ctx, struct klamm_address *at)
{
	klamm_normalise(at);
	if (!klamm_is_listener_address(at) || CTX(ctx->src_port) != listener_port(ctx))
		return PASS;
	if (stamp_of(ctx) == KLAMM_STAMP_OWN)
		return PASS;
	count(KLAMM_REFUSED_BIND);
	tell_of_process(bpf_get_netns_cookie(ctx), KLAMM_REFUSED_BIND, at, CTX(ctx->src_port));
	return REFUSE;
}

SEC("cgroup/post_bind4")
int klamm_post_bind4(struct bpf_sock *ctx)
{
	struct klamm_address at;

	if (!is_tcp(CTX(ctx->type), CTX(ctx->protocol)))
		return PASS;
	klamm_set_v4(&at, CTX(ctx->src_ip4));
	return on_bind(ctx, &at);
}

SEC("cgroup/post_bind6")
int klamm_post_bind6(struct bpf_sock *ctx)
{
	struct klamm_address at;

	if (!is_tcp(CTX(ctx->type), CTX(ctx->protocol)))
		return PASS;
	at.word[0] = CTX(ctx->src_ip6[0]);
	at.word[1] = CTX(ctx->src_ip6[1]);
	at.word[2] = CTX(ctx->src_ip6[2]);
	at.word[3] = CTX(ctx->src_ip6[3]);
	return on_bind(ctx, &at);
}

INLINE void local_end(struct bpf_sock_ops *ctx, struct klamm_address *a, __u32 *port)
{
	if (CTX(ctx->family) == AF_INET) {
		klamm_set_v4(a, CTX(ctx->local_ip4));
	} else {
		a->word[0] = CTX(ctx->local_ip6[0]);
		a->word[1] = CTX(ctx->local_ip6[1]);
		a->word[2] = CTX(ctx->local_ip6[2]);
		a->word[3] = CTX(ctx->local_ip6[3]);
	}
	*port = CTX(ctx->local_port);
}

INLINE void remote_end(struct bpf_sock_ops *ctx, struct klamm_address *a, __u32 *port)
{
	if (CTX(ctx->family) == AF_INET) {
		klamm_set_v4(a, CTX(ctx->remote_ip4));
	} else {
		a->word[0] = CTX(ctx->remote_ip6[0]);
		a->word[1] = CTX(ctx->remote_ip6[1]);
		a->word[2] = CTX(ctx->remote_ip6[2]);
		a->word[3] = CTX(ctx->remote_ip6[3]);
	}
	*port = klamm_be32(CTX(ctx->remote_port));
}

INLINE struct klamm_tuple tuple_of_client(struct bpf_sock_ops *ctx)
{
	struct klamm_tuple t = {.netns_cookie = bpf_get_netns_cookie(ctx)};

	local_end(ctx, &t.client, &t.client_port);
	remote_end(ctx, &t.server, &t.server_port);
	return t;
}

INLINE struct klamm_tuple tuple_of_accepted(struct bpf_sock_ops *ctx)
{
	struct klamm_tuple t = {.netns_cookie = bpf_get_netns_cookie(ctx)};

	remote_end(ctx, &t.client, &t.client_port);
	local_end(ctx, &t.server, &t.server_port);
	return t;
}

INLINE int begin_handshake(const struct klamm_tuple *t, const struct klamm_record *r)
{
	struct klamm_listener *l = bpf_map_lookup_elem(&klamm_enrolled, &t->netns_cookie);

	if (!l || l->handshakes >= KLAMM_HANDSHAKES || bpf_map_update_elem(&klamm_handshake, t, r, BPF_NOEXIST))
		return 0;
	__sync_fetch_and_add(&l->handshakes, 1);
	return 1;
}

INLINE void end_handshake(const struct klamm_tuple *t)
{
	struct klamm_listener *l = bpf_map_lookup_elem(&klamm_enrolled, &t->netns_cookie);

	if (!bpf_map_delete_elem(&klamm_handshake, t) && l)
		__sync_fetch_and_add(&l->handshakes, -1);
}

/* The SYN goes out whatever we return. A connection whose record did not get into handshake is accepted without one,
 * and the node refuses it.
 * Not at ACTIVE_ESTABLISHED: with TCP Fast Open on the server the other side is established before. */
INLINE void on_syn(struct bpf_sock_ops *ctx)
{
	const struct klamm_record *r = client_record(ctx->sk);
	struct klamm_tuple t;

	if (!r)
		return;
	if (bpf_sock_ops_cb_flags_set(ctx, CTX(ctx->bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG)) {
		count(KLAMM_HANDSHAKE_NO_STATE_CALLBACK);
		return;
	}
	t = tuple_of_client(ctx);
	end_handshake(&t); /* of a connection that ended unseen */
	count(begin_handshake(&t, r) ? KLAMM_HANDSHAKE_BEGUN : KLAMM_HANDSHAKE_NO_ENTRY);
}

INLINE void on_client_closed(struct bpf_sock_ops *ctx)
{
	struct klamm_tuple t;

	if (!client_record(ctx->sk))
		return;
	t = tuple_of_client(ctx);
	end_handshake(&t);
}

INLINE void on_accepted(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct klamm_record *r;
	struct klamm_tuple t;

	if (!sk || CTX(ctx->local_port) != listener_port(ctx))
		return;
	t = tuple_of_accepted(ctx);
	r = bpf_map_lookup_elem(&klamm_handshake, &t);
	if (!r) {
		count(KLAMM_ACCEPTED_WITHOUT_RECORD);
		return;
	}
	count(bpf_sk_storage_get(&klamm_accepted, sk, r, BPF_SK_STORAGE_GET_F_CREATE) ? KLAMM_HANDED_OVER
										       : KLAMM_ACCEPTED_NO_STORAGE);
	end_handshake(&t);
}

SEC("sockops")
int klamm_sockops(struct bpf_sock_ops *ctx)
{
	switch (CTX(ctx->op)) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		on_syn(ctx);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		on_accepted(ctx);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (CTX(ctx->args[1]) == TCP_CLOSE)
			on_client_closed(ctx);
		break;
	}
	return 1;
}

/* In practice the first socket of a container is its resolver's: by the time it connects the node listens. */
SEC("cgroup/sock_create")
int klamm_sock_create(struct bpf_sock *ctx)
{
	if (!listener_port(ctx))
		tell_of_process(bpf_get_netns_cookie(ctx), KLAMM_REASONS, NULL, 0);
	return PASS;
}

/* As in a record, but ids and cgroup are the leader's. */
INLINE void read_facts(struct klamm_task *to, struct task_struct___klamm *leader, struct task_struct___klamm *running)
{
	struct cred___klamm *cred = READ(leader, real_cred);

	read_process(to, leader, running);
	to->cgroup_id = READ(READ(READ(READ(leader, cgroups), dfl_cgrp), kn), id);
	to->tgid = READ(leader, tgid);
	to->uid = READ(cred, uid.val);
	to->gid = READ(cred, gid.val);
}

/* Set under the reader's lock. */
volatile __u32 klamm_wanted_pid;

/* Says what a process is now. From Linux 6.1 the reader narrows the iterator to the one process; before that it walks
 * all tasks and the test finds the one. */
SEC("iter/task")
int klamm_task(struct bpf_iter__task___klamm *ctx)
{
	struct task_struct___klamm *task = ctx->task;
	struct klamm_task facts = {};

	if (!task || READ(task, pid) != klamm_wanted_pid)
		return 0;
	read_facts(&facts, task, task);
	bpf_seq_write(ctx->meta->seq, &facts, sizeof(facts));
	return 0;
}

/* Says what all watched processes are now. */
SEC("iter/task")
int klamm_watched_tasks(struct bpf_iter__task___klamm *ctx)
{
	struct task_struct___klamm *task = ctx->task;
	struct klamm_task facts = {};
	__u32 pid;

	if (!task)
		return 0;
	pid = READ(task, pid);
	if (pid != READ(task, tgid) || !is_watched(pid))
		return 0;
	read_facts(&facts, task, task);
	bpf_seq_write(ctx->meta->seq, &facts, sizeof(facts));
	return 0;
}

/* Runs for every execve on the host that has succeeded, and still in its context. */
SEC("raw_tp/sched_process_exec")
int klamm_exec(void *ctx)
{
	__u32 tgid = bpf_get_current_pid_tgid() >> 32, *executed;

	(void)ctx;
	if (!is_watched(tgid))
		return 0;
	executed = bpf_ringbuf_reserve(&klamm_executed, sizeof(*executed), 0);
	if (!executed) {
		count(KLAMM_EVENT_LOST);
		return 0;
	}
	*executed = tgid;
	bpf_ringbuf_submit(executed, 0);
	return 0;
}

/* What connect(2) on a socket connects: for MPTCP its first subflow. */
INLINE struct sock___klamm *connected(struct sock___klamm *sk)
{
	struct mptcp_sock___klamm *mptcp = (void *)sk;

	if (!HAS_FIELD(mptcp->first) || READ(sk, sk_protocol) != IPPROTO_MPTCP)
		return sk;
	/* Without the barrier the field's offset is taken before it is known whether the kernel has one. */
	asm volatile("" : "+r"(mptcp));
	return READ(mptcp, first);
}

/* Says who has the sockets that are sought. Descriptors in flight (SCM_RIGHTS) and in rings of io_uring are nobody's
 * here. */
SEC("iter/task_file")
int klamm_holders(struct bpf_iter__task_file___klamm *ctx)
{
	struct task_struct___klamm *task = ctx->task;
	struct klamm_holder holder = {};
	void *file = ctx->file;
	struct socket___klamm *socket;

	if (!task || !file)
		return 0;
	socket = bpf_sock_from_file(file);
	if (!socket)
		return 0;
	holder.socket = READ(connected(READ(socket, sk)), __sk_common.skc_cookie.counter);
	if (!bpf_map_lookup_elem(&klamm_sought, &holder.socket))
		return 0;
	read_facts(&holder.task, READ(task, group_leader), task);
	bpf_seq_write(ctx->meta->seq, &holder, sizeof(holder));
	return 0;
}
