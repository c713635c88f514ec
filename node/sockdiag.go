package node

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"klamm/bpf"
)

// tcpState is a state of a TCP socket, as the kernel numbers them (include/net/tcp_states.h).
type tcpState uint8

const (
	stateEstablished tcpState = 1 + iota
	stateSynSent
	stateSynRecv
	stateFinWait1
	stateFinWait2
	stateTimeWait
	stateClose
	stateCloseWait
	stateLastAck
	stateListen
	stateClosing
)

var tcpStateNames = map[tcpState]string{
	stateEstablished: "ESTABLISHED", stateSynSent: "SYN_SENT", stateSynRecv: "SYN_RECV", stateFinWait1: "FIN_WAIT1",
	stateFinWait2: "FIN_WAIT2", stateTimeWait: "TIME_WAIT", stateClose: "CLOSE", stateCloseWait: "CLOSE_WAIT",
	stateLastAck: "LAST_ACK", stateListen: "LISTEN", stateClosing: "CLOSING",
}

func (s tcpState) String() string { return tcpStateNames[s] }

// tcpSocket is a TCP socket as sock_diag(7) tells it.
type tcpSocket struct {
	family        byte
	state         tcpState
	id            socketID
	local, remote netip.AddrPort // v4-mapped addresses as IPv4
	uid           uint32
	inode         uint32 // as in /proc/PID/fd; 0 when no process holds the socket
	cgroup        uint64 // in which it was made (Linux 5.8); 0 when the kernel does not say
	own           bool   // it is the node's
}

// socketID is struct inet_diag_sockid: ports, addresses, interface, and the cookie, which is never used twice.
type socketID [48]byte

func (id *socketID) cookie() uint64 { return binary.NativeEndian.Uint64(id[40:]) }

// Of include/uapi/linux/inet_diag.h and sock_diag.h.
const (
	sizeofDiagMessage = 72 // struct inet_diag_msg
	timerTimeWait     = 3  // what is left of a socket in TIME_WAIT, or in FIN_WAIT2 without a process

	diagRequestStorages   = 2 // INET_DIAG_REQ_SK_BPF_STORAGES (Linux 5.7)
	diagRequestStorageMap = 1 // SK_DIAG_BPF_STORAGE_REQ_MAP_FD
	diagStorage           = 1 // SK_DIAG_BPF_STORAGE: a map that has the socket
	diagStorageValue      = 3 // SK_DIAG_BPF_STORAGE_MAP_VALUE
)

// parseSocket reads a struct inet_diag_msg and its attributes. ok is false for what is no socket any more.
func parseSocket(m []byte) (s tcpSocket, ok bool, err error) {
	if len(m) < sizeofDiagMessage {
		return tcpSocket{}, false, fmt.Errorf("an answer of sock_diag has %d bytes, not %d", len(m), sizeofDiagMessage)
	}
	if m[2] == timerTimeWait {
		return tcpSocket{}, false, nil
	}
	s = tcpSocket{family: m[0], state: tcpState(m[1]), id: socketID(m[4:52]),
		uid: binary.NativeEndian.Uint32(m[64:]), inode: binary.NativeEndian.Uint32(m[68:])}
	s.local = s.endpoint(s.id[0:2], s.id[4:20])
	s.remote = s.endpoint(s.id[2:4], s.id[20:36])
	m = m[sizeofDiagMessage:]
	if id := attribute(m, netlink.INET_DIAG_CGROUP_ID); len(id) == 8 {
		s.cgroup = binary.NativeEndian.Uint64(id)
	}
	stamp := attribute(attribute(attribute(m, netlink.INET_DIAG_SK_BPF_STORAGES), diagStorage), diagStorageValue)
	s.own = len(stamp) == 1 && stamp[0] == bpf.StampOwn
	return s, true, nil
}

// attribute finds the value of an attribute; nil if there is none.
func attribute(b []byte, kind uint16) []byte {
	for len(b) >= unix.NLA_HDRLEN {
		length, have := int(binary.NativeEndian.Uint16(b)), binary.NativeEndian.Uint16(b[2:])&^unix.NLA_F_NESTED
		if length < unix.NLA_HDRLEN || length > len(b) {
			return nil
		}
		if have == kind {
			return b[unix.NLA_HDRLEN:length]
		}
		b = b[min((length+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1), len(b)):]
	}
	return nil
}

func (s *tcpSocket) endpoint(port, address []byte) netip.AddrPort {
	if s.family == unix.AF_INET {
		address = address[:4]
	}
	a, _ := netip.AddrFromSlice(address)
	return netip.AddrPortFrom(a.Unmap(), binary.BigEndian.Uint16(port))
}

// diagRequest is struct inet_diag_req_v2, of TCP.
type diagRequest struct {
	family byte
	states uint32 // a bit each
	id     socketID
}

// Len implements nl.NetlinkRequestData.
func (r *diagRequest) Len() int { return 8 + len(r.id) }

// Serialize implements nl.NetlinkRequestData.
func (r *diagRequest) Serialize() []byte {
	b := binary.NativeEndian.AppendUint32([]byte{r.family, unix.IPPROTO_TCP, 0, 0}, r.states)
	return append(b, r.id[:]...)
}

// diag speaks sock_diag(7) with one network namespace. It is for one goroutine at a time.
type diag struct {
	sockets map[int]*nl.SocketHandle
	stamps  int // file descriptor of the sk_storage map of the node's stamps, or noStamps
}

const noStamps = -1

// openDiag opens a socket in the namespace. It stays there whichever thread uses it.
func openDiag(n *netns, stamps int) (*diag, error) {
	var socket *nl.NetlinkSocket
	err := n.do(func() (err error) {
		socket, err = nl.Subscribe(unix.NETLINK_SOCK_DIAG)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open a sock_diag socket in network namespace %d: %w", n.inode, err)
	}
	// Without a timeout a lost answer would be waited for without end.
	err = errors.Join(socket.SetSendTimeout(&nl.SocketTimeoutTv), socket.SetReceiveTimeout(&nl.SocketTimeoutTv))
	if err != nil {
		socket.Close()
		return nil, err
	}
	return &diag{sockets: map[int]*nl.SocketHandle{unix.NETLINK_SOCK_DIAG: {Socket: socket}}, stamps: stamps}, nil
}

func (d *diag) Close() { d.sockets[unix.NETLINK_SOCK_DIAG].Close() }

func (d *diag) request(kind, flags int, r *diagRequest) *nl.NetlinkRequest {
	request := nl.NewNetlinkRequest(kind, flags)
	request.Sockets = d.sockets
	request.AddData(r)
	return request
}

// dumpAttempts bounds how often a dump that a change came into is begun anew.
const dumpAttempts = 8

// dump returns the sockets in some states that match, of both families: a socket of AF_INET6 may speak IPv4.
func (d *diag) dump(match func(tcpSocket) bool, states ...tcpState) ([]tcpSocket, error) {
	var mask uint32
	for _, s := range states {
		mask |= 1 << s
	}
	var all []tcpSocket
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		some, err := uninterrupted(func() ([]tcpSocket, error) { return d.dumpOnce(family, mask, match) })
		if err != nil {
			return nil, fmt.Errorf("list TCP sockets by sock_diag: %w", err)
		}
		all = append(all, some...)
	}
	return all, nil
}

// uninterrupted repeats a dump that the kernel marks with NLM_F_DUMP_INTR: something may be missing in it.
func uninterrupted[T any](dump func() ([]T, error)) (all []T, err error) {
	for range dumpAttempts {
		if all, err = dump(); !errors.Is(err, nl.ErrDumpInterrupted) {
			return all, err
		}
	}
	return nil, fmt.Errorf("%d times: %w", dumpAttempts, err)
}

func (d *diag) dumpOnce(family byte, states uint32, match func(tcpSocket) bool) (found []tcpSocket, err error) {
	request := d.request(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP, &diagRequest{family: family, states: states})
	if d.stamps != noStamps {
		storages := nl.NewRtAttr(diagRequestStorages|unix.NLA_F_NESTED, nil)
		storages.AddRtAttr(diagRequestStorageMap, binary.NativeEndian.AppendUint32(nil, uint32(d.stamps)))
		request.AddData(storages)
	}
	var unreadable error
	err = request.ExecuteIter(unix.NETLINK_SOCK_DIAG, nl.SOCK_DIAG_BY_FAMILY, func(m []byte) bool {
		s, ok, err := parseSocket(m)
		if err != nil {
			unreadable = err
			return false
		}
		if ok && match(s) {
			found = append(found, s)
		}
		return true
	})
	return found, errors.Join(err, unreadable)
}

var (
	errSocketGone = errors.New("the socket is gone")
	errNoDestroy  = errors.New("the kernel is built without CONFIG_INET_DIAG_DESTROY: restart the programs that are " +
		"connected to brokers, or use a kernel that has it")
)

// destroy ends a connection: whoever waits at the socket gets ECONNABORTED, and the peer a reset. It needs
// CAP_NET_ADMIN. It is errSocketGone if the socket does not exist any more, though its addresses may be in use again.
func (d *diag) destroy(s tcpSocket) error {
	_, err := d.request(nl.SOCK_DESTROY, unix.NLM_F_ACK, &diagRequest{family: s.family, id: s.id}).
		Execute(unix.NETLINK_SOCK_DIAG, 0)
	return explainDestroy(s, err)
}

func explainDestroy(s tcpSocket, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOENT):
		return errSocketGone
	case errors.Is(err, unix.EOPNOTSUPP):
		return errNoDestroy
	case errors.Is(err, unix.EPERM):
		err = fmt.Errorf("%w: run as root, or with CAP_NET_ADMIN", err)
	}
	return fmt.Errorf("end the connection of %s to %s: %w", s.local, s.remote, err)
}
