package bpf

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// BenchmarkConnect measures connect(2) over loopback, handshake included, and what each program adds to it.
func BenchmarkConnect(b *testing.B) {
	address := unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	b.Run("without the programs", func(b *testing.B) {
		l := listen(b, "127.0.0.1:0")
		go discard(l)
		address.Port = int(portOf(l))
		connects(b, address)
	})
	b.Run("to a port that is no broker's", func(b *testing.B) {
		p := loaded(b)
		l := listen(b, "127.0.0.1:0")
		go discard(l)
		address.Port = int(portOf(l))
		withStats(b, p, func() { connects(b, address) })
	})
	b.Run("redirected", func(b *testing.B) {
		r := newRig(b)
		go discard(r.listeners[0])
		address.Port = brokerPort
		withStats(b, r.programs, func() { connects(b, address) })
	})
}

func discard(l *net.TCPListener) {
	for {
		conn, err := l.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			_ = conn.Close()
		}
	}
}

// connects times connect(2) alone.
func connects(b *testing.B, to unix.SockaddrInet4) {
	b.Helper()
	var total time.Duration
	for b.Loop() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err != nil {
			b.Fatal(err)
		}
		start := time.Now()
		if err := unix.Connect(fd, &to); err != nil {
			b.Fatal(err)
		}
		total += time.Since(start)
		// Reset on close, or the ports run out in TIME_WAIT.
		if err := errors.Join(unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
			unix.Close(fd)); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(total.Nanoseconds())/float64(b.N), "ns/connect")
}

// withStats reports the time the kernel spent in the programs per operation.
func withStats(b *testing.B, p *Programs, run func()) {
	b.Helper()
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = stats.Close() }()
	run()
	for name, program := range map[string]*ebpf.Program{
		"connect4": p.objects.KlammConnect4, "sockops": p.objects.KlammSockops,
	} {
		s, err := program.Stats()
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(s.Runtime.Nanoseconds())/float64(b.N), "ns-"+name+"/op")
	}
}

// BenchmarkRecord measures what accepting costs beyond accept(2).
func BenchmarkRecord(b *testing.B) {
	r := newRig(b)
	s := step{Do: "connect", To: at("192.0.2.7", brokerPort)}
	fd, err := s.socket()
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = unix.Close(fd) }()
	if got := s.run(fd); got.Error != "" {
		b.Fatal(got.Error)
	}
	_, err = onFD(b, r.accept(0), func(fd int) (Record, error) {
		for b.Loop() {
			if _, err := r.programs.Record(fd); err != nil {
				return Record{}, err
			}
		}
		return Record{}, nil
	})
	if err != nil {
		b.Fatal(err)
	}
}

// BenchmarkTask measures reading a process in the kernel.
func BenchmarkTask(b *testing.B) {
	p := loaded(b)
	pid := uint32(os.Getpid())
	for b.Loop() {
		if _, err := p.Task(pid); err != nil {
			b.Fatal(err)
		}
	}
}
