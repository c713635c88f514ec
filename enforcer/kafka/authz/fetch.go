package authz

import (
	"slices"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// fetch: Topic Read. A follower's fetch (replica id set) takes Cluster ClusterAction instead, which is a right to read
// every topic, as at a broker.
func fetch(c *Ctx, req *kmsg.FetchRequest) Verdict {
	sessions := req.Version >= 7
	incremental := sessions && isIncremental(req.SessionEpoch)
	if incremental {
		if err := c.Fetch.admits(req); err != nil {
			return fetchError(req, err)
		}
	}
	if req.ReplicaID >= 0 || req.ReplicaState.ID >= 0 {
		allowed := c.AllowCluster(kmsg.ACLOperationClusterAction)
		c.Follows = &c.Checks[len(c.Checks)-1].Decision
		if !allowed {
			return fetchRefuseAll(req)
		}
	}
	m := c.Fetch
	if !incremental {
		m = newFetchSession(c, req)
	}
	judged, known := m.judge(c, req)
	switch {
	case !known:
		return Verdict{}
	case incremental:
		return m.increment(c, req, judged)
	default:
		return m.open(c, req, judged, sessions && req.SessionEpoch == fetchOpens)
	}
}

// FilterFetched takes out of the answer to a Fetch or ShareFetch what the view does not let the client read: the policy
// changed while the broker was waiting for records.
func FilterFetched(c *Ctx, resp kmsg.Response) {
	switch resp := resp.(type) {
	case *kmsg.FetchResponse:
		filterFetch(c, resp)
	case *kmsg.ShareFetchResponse:
		filterShareFetch(c, resp)
	}
}

func filterFetch(c *Ctx, resp *kmsg.FetchResponse) {
	for i := range resp.Topics {
		t := &resp.Topics[i]
		refused := c.fetchRefusal(resp.Version, t.Topic, t.TopicID)
		if refused == 0 {
			continue
		}
		for j := range t.Partitions {
			t.Partitions[j] = refusedPartition(t.Partitions[j].Partition, refused)
		}
	}
}

// fetchRefusal decides one topic; 0 lets it be read.
func (c *Ctx) fetchRefusal(version int16, name string, id TopicID) int16 {
	if c.Follows != nil && c.Visible(kmsg.ACLResourceTypeCluster, clusterName, kmsg.ACLOperationClusterAction) {
		return 0
	}
	name, known := c.fetchName(version, name, id)
	switch {
	case !known:
		return kerr.UnknownTopicID.Code
	case !c.AllowTopic(name, kmsg.ACLOperationRead):
		if version >= 13 {
			c.doubt(id)
		}
		return kerr.TopicAuthorizationFailed.Code
	}
	return 0
}

func (c *Ctx) fetchName(version int16, name string, id TopicID) (string, bool) {
	if version < 13 {
		return name, true
	}
	return c.Topic(id)
}

func fetchKey(version int16, name string, id TopicID) string {
	if version < 13 {
		return name
	}
	return string(id[:])
}

func fetchError(req *kmsg.FetchRequest, err *kerr.Error) Verdict {
	resp := req.ResponseKind().(*kmsg.FetchResponse)
	resp.ErrorCode = err.Code
	return Verdict{Answer: resp}
}

// fetchRefuseAll answers every partition, each once, as one the client may not read.
func fetchRefuseAll(req *kmsg.FetchRequest) Verdict {
	resp := req.ResponseKind().(*kmsg.FetchResponse)
	for i := range req.Topics {
		t := kmsg.NewFetchResponseTopic()
		t.Topic, t.TopicID = req.Topics[i].Topic, req.Topics[i].TopicID
		for _, p := range req.Topics[i].Partitions {
			t.Partitions = append(t.Partitions, refusedPartition(p.Partition, kerr.TopicAuthorizationFailed.Code))
		}
		resp.Topics = append(resp.Topics, t)
	}
	resp.Topics = fold(resp.Topics, func(t *kmsg.FetchResponseTopic) metadataName {
		return metadataName{t.Topic, t.TopicID}
	}, func(first, other *kmsg.FetchResponseTopic) {
		first.Partitions = append(first.Partitions, other.Partitions...)
	})
	for i := range resp.Topics {
		resp.Topics[i].Partitions = once(resp.Topics[i].Partitions, func(p *kmsg.FetchResponseTopicPartition) int32 {
			return p.Partition
		})
	}
	resp.Topics = slices.DeleteFunc(resp.Topics, func(t kmsg.FetchResponseTopic) bool { return len(t.Partitions) == 0 })
	return Verdict{Answer: resp}
}
