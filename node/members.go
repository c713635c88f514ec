package node

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/kafka/authz"
)

const (
	// maxMemberSize bounds the members kept of one cluster, in bytes. Those not heard of for longest go, and are looked up
	// again when they are.
	maxMemberSize = 64 << 20
	// maxGroups is how many groups one request to the brokers describes.
	maxGroups = 100
	// maxWanted bounds the members to look up, and maxMemberName the bytes of what they are called. Clients that invent
	// members cannot make it more; one that is left out comes again with its next heartbeat.
	maxWanted     = 10_000
	maxMemberName = 1024
)

// members is what is known of the members of one cluster's groups. The brokers have it all: what is forgotten here, or
// was never known because another node has seen it, is read from them.
type members struct {
	pace pace
	log  zerolog.Logger

	mu         sync.Mutex
	young, old map[authz.MemberName]*authz.Member // what is used moves from old to young; old goes when young is full
	size       int                                // of young
	wanted     map[string]map[string]struct{}     // group -> members to look up
	wants      int                                // how many they are
	absent     map[authz.MemberName]time.Time     // not found, until when that is believed
	runs       bool                               // a look-up
	refused    bool                               // it was told that the brokers do not let the node look
}

func newMembers(p pace, log zerolog.Logger) *members {
	return &members{pace: p, log: log, young: map[authz.MemberName]*authz.Member{},
		wanted: map[string]map[string]struct{}{}, absent: map[authz.MemberName]time.Time{}}
}

// Member is what is known of a member; see [authz.Groups].
func (m *members) Member(group, id string) *authz.Member {
	name := authz.MemberName{Group: group, ID: id}
	m.mu.Lock()
	defer m.mu.Unlock()
	if known := m.young[name]; known != nil {
		return known
	}
	known := m.old[name]
	if known != nil {
		m.keep(name, known)
	}
	return known
}

// SetMember keeps or forgets a member.
func (m *members) SetMember(group, id string, member *authz.Member) {
	name := authz.MemberName{Group: group, ID: id}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.keep(name, member)
}

// keep replaces a member. m.mu is held.
func (m *members) keep(name authz.MemberName, member *authz.Member) {
	if was := m.young[name]; was != nil {
		m.size -= sizeOf(name, was)
		delete(m.young, name)
	}
	delete(m.old, name)
	if member == nil {
		return
	}
	if m.size += sizeOf(name, member); m.size > maxMemberSize/2 {
		m.young, m.old, m.size = map[authz.MemberName]*authz.Member{}, m.young, sizeOf(name, member)
	}
	m.young[name] = member
}

func sizeOf(name authz.MemberName, member *authz.Member) int {
	return len(name.Group) + len(name.ID) + member.Size()
}

// want has a member looked up.
func (m *members) want(name authz.MemberName, start func(func(context.Context)), client *kgo.Client) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, waits := m.wanted[name.Group][name.ID]; waits || m.wants >= maxWanted ||
		len(name.Group)+len(name.ID) > maxMemberName || time.Now().Before(m.absent[name]) {
		return
	}
	if m.wanted[name.Group] == nil {
		m.wanted[name.Group] = map[string]struct{}{}
	}
	m.wanted[name.Group][name.ID] = struct{}{}
	m.wants++
	if !m.runs {
		m.runs = true
		start(func(ctx context.Context) { m.run(ctx, client) })
	}
}

// run looks members up until none is wanted.
func (m *members) run(ctx context.Context, client *kgo.Client) {
	for {
		select {
		case <-time.After(m.pace.lookups):
		case <-ctx.Done():
			return
		}
		groups := m.some()
		if len(groups) == 0 {
			return
		}
		described, err := describeGroups(ctx, client, groups)
		m.found(groups, described, err)
	}
}

// some are groups with members to look up; none ends the look-up.
func (m *members) some() map[string]map[string]struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	groups := map[string]map[string]struct{}{}
	for group, ids := range m.wanted {
		if len(groups) == maxGroups {
			break
		}
		groups[group] = ids
		delete(m.wanted, group)
		m.wants -= len(ids)
	}
	m.runs = len(groups) > 0
	return groups
}

func describeGroups(ctx context.Context, client *kgo.Client, groups map[string]map[string]struct{},
) (*kmsg.ConsumerGroupDescribeResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	req := kmsg.NewPtrConsumerGroupDescribeRequest()
	for group := range groups {
		req.Groups = append(req.Groups, group)
	}
	resp, err := req.RequestWith(ctx, client)
	if err != nil {
		return nil, fmt.Errorf("describe %d consumer groups: %w", len(groups), err)
	}
	return resp, nil
}

// found takes up what was described. Who is not found is not looked for again for a while.
func (m *members) found(groups map[string]map[string]struct{}, resp *kmsg.ConsumerGroupDescribeResponse, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := 0; err == nil && i < len(resp.Groups); i++ {
		g := &resp.Groups[i]
		switch g.ErrorCode {
		case kerr.GroupAuthorizationFailed.Code, kerr.TopicAuthorizationFailed.Code:
			if !m.refused {
				m.refused = true
				m.log.Warn().Str("group", g.Group).Msg("the node's own client may not describe consumer groups and their " +
					"topics: what members subscribe to by regular expression does not survive the node; allow its principal " +
					"to Describe all groups and topics")
			}
		}
		for j := range g.Members {
			name := authz.MemberName{Group: g.Group, ID: g.Members[j].MemberID}
			if _, wanted := groups[name.Group][name.ID]; !wanted {
				continue
			}
			delete(groups[name.Group], name.ID)
			if m.young[name] == nil && m.old[name] == nil { // what a heartbeat has said since is newer
				m.keep(name, authz.MemberDescribed(&g.Members[j]))
			}
		}
	}
	if err != nil {
		m.log.Warn().Err(err).Msg("cannot look up members of consumer groups")
	}
	if len(m.absent) > maxUnknown {
		clear(m.absent)
	}
	for group, ids := range groups {
		for id := range ids {
			m.absent[authz.MemberName{Group: group, ID: id}] = time.Now().Add(m.pace.absent)
		}
	}
}
