package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"

	"github.com/rs/zerolog"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"

	"klamm/enforcer/policy/acls"
	"klamm/spiffe"
)

// aclsPath is where the node that runs reads a cluster's ACLs.
const aclsPath = "/v1/acls"

// aclsAnswer is a broker's, in Kafka's own encoding, or why there is none.
type aclsAnswer struct {
	Version int16
	Body    []byte
	Error   string
}

// ACLs reads the ACLs of a configured cluster as the node's own client. The node that runs does it, else this process,
// which then must not be redirected.
func ACLs(ctx context.Context, c Config, cluster string) ([]acls.ACL, error) {
	i := slices.IndexFunc(c.Clusters, func(c ClusterConfig) bool { return c.Name == cluster })
	if i < 0 {
		return nil, fmt.Errorf("there is no cluster %q in the configuration", cluster)
	}
	var answer aclsAnswer
	err := ErrNobody
	if c.Node.Socket != "" {
		err = Ask(ctx, c.Node.Socket, aclsPath+"?"+url.Values{"cluster": {cluster}}.Encode(), &answer)
	}
	if errors.Is(err, ErrNobody) {
		answer, err = askACLs(ctx, c, c.Clusters[i])
	}
	switch {
	case err != nil:
		return nil, err
	case answer.Error != "":
		return nil, errors.New(answer.Error)
	}
	resp := kmsg.NewPtrDescribeACLsResponse()
	resp.Version = answer.Version
	if err := resp.ReadFrom(answer.Body); err != nil {
		return nil, fmt.Errorf("read the ACLs of %s: %w", cluster, err)
	}
	return acls.Answered(resp)
}

// askACLs is what the node does where none runs.
func askACLs(ctx context.Context, c Config, of ClusterConfig) (aclsAnswer, error) {
	spire, end, err := c.openSPIRE()
	if err != nil {
		return aclsAnswer{}, err
	}
	defer end()
	return readACLs(ctx, of, agentOf(spire), new(net.Dialer).DialContext), nil
}

// serveACLs is ACLs for who asks at the control socket.
func (n *Node) serveACLs(w http.ResponseWriter, r *http.Request) {
	name := r.URL.Query().Get("cluster")
	answer := aclsAnswer{Error: fmt.Sprintf("the node that runs has no cluster %q in its configuration", name)}
	for _, c := range n.config.Clusters {
		if c.Name == name {
			answer = readACLs(r.Context(), c, agentOf(n.spire), n.redirect.Dialer().DialContext)
		}
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer)
}

func readACLs(ctx context.Context, c ClusterConfig, agent *spiffe.Agent, dial DialFunc) aclsAnswer {
	failed := func(err error) aclsAnswer {
		return aclsAnswer{Error: fmt.Sprintf("read the ACLs of cluster %s: %v", c.Name, err)}
	}
	client, err := newClient(c, agent, dial)
	if err != nil {
		return failed(err)
	}
	defer client.Close()
	if agent != nil {
		agent.Asked(ctx) // else the first handshake would come too early
	}
	resp, err := acls.Request().RequestWith(ctx, client)
	if err == nil {
		err = kerr.ErrorForCode(resp.ErrorCode)
	}
	switch {
	case errors.Is(err, kerr.ClusterAuthorizationFailed):
		return failed(errors.New("the principal of the node's own client may not see them: allow it to Describe the cluster"))
	case errors.Is(err, kerr.SecurityDisabled):
		return failed(errors.New("its brokers have no authorizer, so there are none"))
	case err != nil:
		return failed(err)
	}
	return aclsAnswer{Version: resp.Version, Body: resp.AppendTo(nil)}
}

// openSPIRE is nil where no SPIRE agent is configured. The caller ends it.
func (c Config) openSPIRE() (spire *spiffe.SPIRE, end func(), err error) {
	if c.SPIRE == nil {
		return nil, func() {}, nil
	}
	options := c.SPIRE.options()
	options.Log = zerolog.Nop()
	if spire, err = spiffe.NewSPIRE(options, nil); err != nil {
		return nil, nil, err
	}
	return spire, func() { _ = spire.Close() }, nil
}

func agentOf(spire *spiffe.SPIRE) *spiffe.Agent {
	if spire == nil {
		return nil
	}
	return spire.Agent()
}
