package bpf

import (
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
)

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target bpfel -tags linux -cflags "-O2 -mcpu=v3 -Wall -Wextra -Werror" connectCase test_connect.bpf.c

func TestDecisionOnAConnect(t *testing.T) {
	var objects connectCaseObjects
	if err := loadConnectCaseObjects(&objects, nil); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = objects.Close() }()
	run := func(t *testing.T, c connectCaseKlammCase) connectCaseKlammCase {
		t.Helper()
		if err := objects.KlammTheCase.Set(c); err != nil {
			t.Fatal(err)
		}
		if _, err := objects.KlammTestConnect.Run(&ebpf.RunOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := objects.KlammTheCase.Get(&c); err != nil {
			t.Fatal(err)
		}
		return c
	}

	type facts struct {
		broker, stamped, kernelThread, exempt, down, enforcerDown, passDown, passUnenrolled bool
	}
	const listener = 40000
	for _, c := range []struct {
		name     string
		to       string
		listener uint16
		facts    facts
		want     redirectKlammReason
	}{
		{"a port that is no broker's passes", "10.0.0.1:80", listener, facts{},
			redirectKlammReasonKLAMM_PASSED_FOREIGN},
		{"a port that is no broker's passes where nothing is enrolled", "10.0.0.1:80", 0, facts{},
			redirectKlammReasonKLAMM_PASSED_FOREIGN},
		{"a broker's port on any address is redirected", "192.0.2.7:9092", listener, facts{broker: true},
			redirectKlammReasonKLAMM_REDIRECTED},
		{"a broker's port on an IPv6 address is redirected", "[2001:db8::7]:9092", listener, facts{broker: true},
			redirectKlammReasonKLAMM_REDIRECTED},
		{"a broker on loopback is redirected", "127.0.0.1:9092", listener, facts{broker: true},
			redirectKlammReasonKLAMM_REDIRECTED},
		{"a broker on the unspecified address is redirected", "0.0.0.0:9092", listener, facts{broker: true},
			redirectKlammReasonKLAMM_REDIRECTED},
		{"a broker that is down is refused", "192.0.2.7:9092", listener, facts{broker: true, down: true},
			redirectKlammReasonKLAMM_REFUSED_DOWN},
		{"an exempt process finds out itself", "192.0.2.7:9092", listener, facts{broker: true, exempt: true, down: true},
			redirectKlammReasonKLAMM_PASSED_EXEMPT},
		{"a broker is refused where nothing is enrolled", "192.0.2.7:9092", 0, facts{broker: true},
			redirectKlammReasonKLAMM_REFUSED_NOT_ENROLLED},
		{"a broker passes where nothing is enrolled and that may pass", "192.0.2.7:9092", 0,
			facts{broker: true, passUnenrolled: true}, redirectKlammReasonKLAMM_PASSED_NOT_ENROLLED},
		{"what is enrolled does not pass because what is not may", "192.0.2.7:9092", listener,
			facts{broker: true, passUnenrolled: true, passDown: true}, redirectKlammReasonKLAMM_REDIRECTED},
		{"a broker is refused while the enforcer is down", "192.0.2.7:9092", listener,
			facts{broker: true, enforcerDown: true}, redirectKlammReasonKLAMM_REFUSED_ENFORCER_DOWN},
		{"a broker is refused while the enforcer is down though what is not enrolled may pass", "192.0.2.7:9092", 0,
			facts{broker: true, enforcerDown: true, passUnenrolled: true},
			redirectKlammReasonKLAMM_REFUSED_ENFORCER_DOWN},
		{"a broker passes while the enforcer is down and that may pass", "192.0.2.7:9092", listener,
			facts{broker: true, enforcerDown: true, passDown: true}, redirectKlammReasonKLAMM_PASSED_ENFORCER_DOWN},
		{"the listener may not be connected to while the enforcer is down", "127.0.0.1:40000", listener,
			facts{enforcerDown: true, passDown: true}, redirectKlammReasonKLAMM_REFUSED_DIRECT},
		{"a port that is no broker's passes while the enforcer is down", "10.0.0.1:80", listener,
			facts{enforcerDown: true}, redirectKlammReasonKLAMM_PASSED_FOREIGN},
		{"the node's own socket passes to a broker", "192.0.2.7:9092", listener, facts{broker: true, stamped: true},
			redirectKlammReasonKLAMM_PASSED_STAMPED},
		{"the node's own socket passes where nothing is enrolled", "192.0.2.7:9092", 0,
			facts{broker: true, stamped: true}, redirectKlammReasonKLAMM_PASSED_STAMPED},
		{"a kernel thread passes", "192.0.2.7:9092", listener, facts{broker: true, kernelThread: true},
			redirectKlammReasonKLAMM_PASSED_KERNEL_THREAD},
		{"an exempt process passes", "192.0.2.7:9092", listener, facts{broker: true, exempt: true},
			redirectKlammReasonKLAMM_PASSED_EXEMPT},
		{"the listener may not be connected to", "127.0.0.1:40000", listener, facts{},
			redirectKlammReasonKLAMM_REFUSED_DIRECT},
		{"the listener may not be connected to by another loopback address", "127.9.9.9:40000", listener, facts{},
			redirectKlammReasonKLAMM_REFUSED_DIRECT},
		{"the listener may not be connected to by IPv6", "[::1]:40000", listener, facts{},
			redirectKlammReasonKLAMM_REFUSED_DIRECT},
		{"the listener may not be connected to by a mapped address", "[::ffff:127.0.0.1]:40000", listener, facts{},
			redirectKlammReasonKLAMM_REFUSED_DIRECT},
		{"the listener may not be connected to by 0.0.0.0", "0.0.0.0:40000", listener, facts{},
			redirectKlammReasonKLAMM_REFUSED_DIRECT},
		{"the listener may not be connected to by ::", "[::]:40000", listener, facts{},
			redirectKlammReasonKLAMM_REFUSED_DIRECT},
		{"the listener may not be connected to by the mapped unspecified address", "[::ffff:0.0.0.0]:40000", listener,
			facts{}, redirectKlammReasonKLAMM_REFUSED_DIRECT},
		{"the listener may not be connected to by an exempt process", "127.0.0.1:40000", listener, facts{exempt: true},
			redirectKlammReasonKLAMM_REFUSED_DIRECT},
		{"the listener is no broker even where its port is one", "127.0.0.1:40000", listener, facts{broker: true},
			redirectKlammReasonKLAMM_REFUSED_DIRECT},
		{"the listener's port on another host is only a port", "192.0.2.7:40000", listener, facts{},
			redirectKlammReasonKLAMM_PASSED_FOREIGN},
		{"port 0 on loopback is no listener where nothing is enrolled", "127.0.0.1:0", 0, facts{},
			redirectKlammReasonKLAMM_PASSED_FOREIGN},
	} {
		t.Run(c.name, func(t *testing.T) {
			to := netip.MustParseAddrPort(c.to)
			in := connectCaseKlammCase{}
			in.Connect.To.Word = words(to.Addr().As16()).Word
			in.Connect.Port = to.Port()
			in.Connect.Listener = c.listener
			in.Connect.Broker = b2u(c.facts.broker)
			in.Connect.Stamped = b2u(c.facts.stamped)
			in.Connect.KernelThread = b2u(c.facts.kernelThread)
			in.Connect.Exempt = b2u(c.facts.exempt)
			in.Connect.Down = b2u(c.facts.down)
			in.Connect.EnforcerDown = b2u(c.facts.enforcerDown)
			in.Connect.PassDown = b2u(c.facts.passDown)
			in.Connect.PassUnenrolled = b2u(c.facts.passUnenrolled)
			if got := redirectKlammReason(run(t, in).Reason); got != c.want {
				t.Errorf("got %s, want %s", counterNames[got], counterNames[c.want])
			}
		})
	}

	for _, c := range []struct{ name, to, normalised, listener string }{
		{"an IPv4 destination goes to IPv4 loopback", "192.0.2.7", "192.0.2.7", "127.0.0.1"},
		{"a mapped destination stays mapped", "::ffff:192.0.2.7", "192.0.2.7", "127.0.0.1"},
		{"an IPv6 destination goes to IPv6 loopback", "2001:db8::7", "2001:db8::7", "::1"},
		{"0.0.0.0 is loopback", "0.0.0.0", "127.0.0.1", "127.0.0.1"},
		{"the mapped 0.0.0.0 is loopback", "::ffff:0.0.0.0", "127.0.0.1", "127.0.0.1"},
		{":: is loopback", "::", "::1", "::1"},
		{"another address of 127/8 is kept", "127.0.0.2", "127.0.0.2", "127.0.0.1"},
		{"an address that only ends in zeros is kept", "2001:db8::", "2001:db8::", "::1"},
		{"0.0.0.1 is kept", "0.0.0.1", "0.0.0.1", "127.0.0.1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := connectCaseKlammCase{}
			in.Connect.To.Word = words(netip.MustParseAddr(c.to).As16()).Word
			out := run(t, in)
			if want := words(netip.MustParseAddr(c.normalised).As16()).Word; out.Connect.To.Word != want {
				t.Errorf("normalised to %x, want %x", out.Connect.To.Word, want)
			}
			if want := words(netip.MustParseAddr(c.listener).As16()).Word; out.Listener.Word != want {
				t.Errorf("sent to %x, want %x", out.Listener.Word, want)
			}
		})
	}
}
