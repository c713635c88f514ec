package bpf

import "fmt"

// counterNames names what klamm_reason of connect.h counts.
//
//nolint:gosec // names, and no credentials
var counterNames = [redirectKlammReasonKLAMM_REASONS]string{
	redirectKlammReasonKLAMM_PASSED_FOREIGN:              "passed_foreign",
	redirectKlammReasonKLAMM_PASSED_STAMPED:              "passed_stamped",
	redirectKlammReasonKLAMM_PASSED_KERNEL_THREAD:        "passed_kernel_thread",
	redirectKlammReasonKLAMM_PASSED_EXEMPT:               "passed_exempt",
	redirectKlammReasonKLAMM_PASSED_ENFORCER_DOWN:        "passed_enforcer_down",
	redirectKlammReasonKLAMM_PASSED_NOT_ENROLLED:         "passed_not_enrolled",
	redirectKlammReasonKLAMM_REDIRECTED:                  "redirected",
	redirectKlammReasonKLAMM_REFUSED_DIRECT:              "refused_direct",
	redirectKlammReasonKLAMM_REFUSED_NOT_ENROLLED:        "refused_not_enrolled",
	redirectKlammReasonKLAMM_REFUSED_ENFORCER_DOWN:       "refused_enforcer_down",
	redirectKlammReasonKLAMM_REFUSED_DOWN:                "refused_down",
	redirectKlammReasonKLAMM_REFUSED_NO_SOCKET:           "refused_no_socket",
	redirectKlammReasonKLAMM_REFUSED_NO_STORAGE:          "refused_no_storage",
	redirectKlammReasonKLAMM_REFUSED_BOUND_DEVICE:        "refused_bound_device",
	redirectKlammReasonKLAMM_REFUSED_BIND:                "refused_bind",
	redirectKlammReasonKLAMM_HANDSHAKE_BEGUN:             "handshake_begun",
	redirectKlammReasonKLAMM_HANDSHAKE_NO_STATE_CALLBACK: "handshake_no_state_callback",
	redirectKlammReasonKLAMM_HANDSHAKE_NO_ENTRY:          "handshake_no_entry",
	redirectKlammReasonKLAMM_HANDED_OVER:                 "handed_over",
	redirectKlammReasonKLAMM_ACCEPTED_WITHOUT_RECORD:     "accepted_without_record",
	redirectKlammReasonKLAMM_ACCEPTED_NO_STORAGE:         "accepted_no_storage",
	redirectKlammReasonKLAMM_DROPPED_EGRESS:              "dropped_egress",
	redirectKlammReasonKLAMM_DROPPED_FRAGMENT:            "dropped_fragment",
	redirectKlammReasonKLAMM_DROPPED_UNREADABLE:          "dropped_unreadable",
	redirectKlammReasonKLAMM_EVENT_LOST:                  "event_lost",
}

// Counters returns how often each thing has happened since Load, or since the pins were made, by name:
//
//	passed_foreign               connects that are not broker-bound
//	passed_stamped               broker-bound connects of the node itself
//	passed_kernel_thread         broker-bound connects of kernel threads
//	passed_exempt                broker-bound connects from exempt cgroups
//	passed_enforcer_down         broker-bound connects while the enforcer was down, and may pass by configuration
//	passed_not_enrolled          those in a network namespace without a listener that may pass by configuration
//	redirected                   connects sent to the listener
//	refused_direct               connects straight to the listener
//	refused_not_enrolled         broker-bound connects in a network namespace that has no listener
//	refused_enforcer_down        broker-bound connects while the enforcer was down: stopped or hung
//	refused_down                 connects to a broker that the node could not reach a moment ago
//	refused_no_socket            the kernel gave the hook no socket
//	refused_no_storage           the record could not be made: net.core.optmem_max or memory
//	refused_bound_device         SO_BINDTODEVICE could not be lifted
//	refused_bind                 somebody else tried to bind the listener's port
//	handshake_begun              records on their way to the listener
//	handshake_no_state_callback  the kernel would not tell when the client closes; the node refuses the connection
//	handshake_no_entry           the handshake map is full or memory is short; the node refuses the connection
//	handed_over                  records that arrived at an accepted socket
//	accepted_without_record      accepted sockets with no record; the node refuses them
//	accepted_no_storage          accepted sockets whose record could not be made; the node refuses them
//	dropped_egress               broker-bound packets of sockets that connect4/6 did not let go
//	dropped_fragment             parts of TCP segments, which only hand-made packets are
//	dropped_unreadable           packets whose headers make no sense
//	event_lost                   events that the node was too slow for
//
// All refused_no_* and refused_bound_device, all handshake_no_* and accepted_* should stay 0 on a sound host. dropped_*
// and refused_direct tell of somebody who tries to go around.
func (p *Programs) Counters() (map[string]uint64, error) {
	counters := make(map[string]uint64, len(counterNames))
	for reason, name := range counterNames {
		var perCPU []uint64
		if err := p.objects.KlammCounters.Lookup(uint32(reason), &perCPU); err != nil {
			return nil, fmt.Errorf("read the kernel's counter %s: %w", name, err)
		}
		for _, n := range perCPU {
			counters[name] += n
		}
	}
	return counters, nil
}
