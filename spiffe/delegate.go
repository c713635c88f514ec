package spiffe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

// delegate asks the SPIRE agent for what it gives to another process. Neither API watches the process: the caller
// proves before and after each call, and with each update, that the pid still is the process it means.
type delegate interface {
	// x509 tells the X509-SVIDs of a process, at once and whenever they change; none is no identity. It returns when
	// the stream or ctx ends, never nil.
	x509(ctx context.Context, pid int32, tell func([]rawSVID)) error
	// jwt is the process' JWT-SVIDs for an audience, at least one.
	jwt(ctx context.Context, pid int32, audience string) (tokens []string, err error)
	close() error
}

// rawSVID is an X509-SVID as the agent sent it.
type rawSVID struct {
	chain, key []byte // DER, PKCS#8 DER
	hint       string
	bundle     []byte // of its trust domain, DER; nil where the API has it elsewhere
}

// The APIs of a SPIRE agent by which a node asks for the SVIDs of other processes.
const (
	APIBroker    = "broker"    // SPIFFE Broker API, SPIRE 1.15.2 and later (experimental there)
	APIDelegated = "delegated" // Delegated Identity API, SPIRE 1.10.2 and later
)

// APIs are all of them.
var APIs = []string{APIBroker, APIDelegated}

const (
	workloadAPI = "Workload API"
	brokerAPI   = "SPIFFE Broker API"
	adminAPI    = "Delegated Identity API"
)

const (
	// maxAnswer bounds one message of the agent, in bytes: an SVID takes some 2 KiB, a bundle some 1 KiB per root.
	maxAnswer = 4 << 20
	// answerTimeout is how long the agent may take to say the first word about a workload. Its attestor for Kubernetes
	// waits half a minute for the kubelet to know of a container.
	answerTimeout = 45 * time.Second
	// muteTimeout is the same about the node itself, which the agent knows or not.
	muteTimeout    = 5 * time.Second
	connectTimeout = 20 * time.Second
	// minRetry and maxRetry bound the pauses between attempts to be heard by the agent at all.
	minRetry, maxRetry = 100 * time.Millisecond, time.Second
	// maxFollow bounds the pauses between attempts to follow one workload. All are cut short when the agent is back.
	maxFollow = 5 * time.Second
)

// dial connects to a unix socket when it is first used, and again when it has to.
func dial(socket string, transport credentials.TransportCredentials) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix:"+socket, append(dialOptions(), grpc.WithTransportCredentials(transport))...)
}

// dialOptions bound answers and the pauses between attempts to connect, which gRPC would let grow to two minutes.
func dialOptions() []grpc.DialOption {
	retry := backoff.Config{BaseDelay: minRetry, Multiplier: 2, Jitter: 0.5, MaxDelay: maxRetry}
	return []grpc.DialOption{grpc.WithNoProxy(), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: retry, MinConnectTimeout: connectTimeout})}
}

// retries are the pauses between attempts: they double from minRetry to max, less up to a half at random, so that the
// streams of a node do not come to an agent all at once.
type retries struct {
	max time.Duration
	n   int
}

func (r *retries) Next() time.Duration {
	d := min(minRetry<<min(r.n, 16), r.max)
	r.n++
	return d - rand.N(d/2) //nolint:gosec // jitter needs no secrecy
}

func (r *retries) Reset() { r.n = 0 }

// AgentError says what a SPIRE agent did not do, and what can be done about it.
type AgentError struct {
	API    string // in words
	Socket string
	Err    error
	Remedy string
}

func (e *AgentError) Error() string {
	text := fmt.Sprintf("%s at %s: %v", e.API, e.Socket, reason(e.Err))
	if e.Remedy != "" {
		text += ": " + e.Remedy
	}
	return text
}

// Unwrap is what the agent, or the way to it, said.
func (e *AgentError) Unwrap() error { return e.Err }

// reason is a gRPC error in fewer words.
func reason(err error) string {
	s, ok := status.FromError(err)
	if !ok || s.Code() == codes.OK {
		return err.Error()
	}
	return fmt.Sprintf("%s (%s)", s.Message(), s.Code())
}

var errMute = errors.New("no answer")

// muteTexts are in gRPC's errors when its own time to connect is over: nobody accepts, or nobody speaks.
var muteTexts = []string{"use of closed network connection", "context deadline exceeded"}

// remedies say what to do about an error, by what it holds. The first that fits wins; an empty field fits all.
var remedies = []struct {
	api, text string
	code      codes.Code
	remedy    string
}{
	{text: "no such file or directory", remedy: "start the SPIRE agent, or mend the socket's path"},
	{text: "connection refused", remedy: "no agent listens there any more: start the SPIRE agent"},
	{text: "connect: permission denied", remedy: "let the node into the socket's directory: give it the node's group" +
		" and mode 2750, and start the agent anew"},
	{api: brokerAPI, text: "bad certificate", remedy: "list the node's SPIFFE ID under agent.experimental.broker.brokers" +
		" in the agent's configuration"},
	{api: adminAPI, text: "authorized delegate", remedy: "list the node's SPIFFE ID under agent.authorized_delegates in" +
		" the agent's configuration"},
	{api: brokerAPI, text: "first record does not look like a TLS handshake", remedy: "give the socket_path of the" +
		" section agent.experimental.broker of the agent's configuration"},
	{api: brokerAPI, text: "reference type", remedy: "add spiffe.broker.WorkloadPIDReference to the node's" +
		" allowed_reference_types in the agent's configuration"},
	{api: brokerAPI, code: codes.PermissionDenied, remedy: "the agent does not give this workload's identity to the node"},
	{code: codes.PermissionDenied, text: "no identity issued", remedy: "register the node: spire-server entry create" +
		" with selectors of its process"},
	{api: adminAPI, code: codes.Unimplemented, remedy: "give the admin_socket_path of a SPIRE agent 1.10.2 or later"},
	{api: adminAPI, code: codes.InvalidArgument, remedy: "the agent takes no pid: it must be SPIRE 1.10.2 or later"},
	{api: brokerAPI, code: codes.Unimplemented, remedy: "give the socket_path of the section" +
		" agent.experimental.broker of a SPIRE agent 1.15.2 or later"},
	{code: codes.DeadlineExceeded, remedy: "the agent hangs: look at its log, or start it anew"},
	{code: codes.ResourceExhausted, remedy: "the answer is larger than 4 MiB: has the workload, or its federation, that" +
		" many entries?"},
}

// agentError adds to an error of a call where it comes from and what to do. Nil stays nil.
func agentError(api, socket string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, io.EOF) {
		err = errors.New("the agent ended the stream")
	}
	for _, text := range muteTexts {
		if status.Code(err) == codes.Unavailable && strings.Contains(err.Error(), text) {
			err = fmt.Errorf("%w within %v", errMute, connectTimeout)
		}
	}
	e := &AgentError{API: api, Socket: socket, Err: err}
	code := status.Code(err)
	if errors.Is(err, errMute) {
		code = codes.DeadlineExceeded
	}
	for _, r := range remedies {
		if (r.api == "" || r.api == api) && (r.code == codes.OK || r.code == code) &&
			strings.Contains(err.Error(), r.text) {
			e.Remedy = r.remedy
			break
		}
	}
	return e
}

// denials are the answers by which an agent says that the workload has no identity, or the node no right to it. What it
// said before holds no longer. All other errors say nothing about the workload.
var denials = map[codes.Code]bool{
	codes.PermissionDenied: true, codes.Unauthenticated: true, codes.NotFound: true, codes.InvalidArgument: true,
	codes.Unimplemented: true, codes.FailedPrecondition: true,
}

func denied(err error) bool {
	var agent *AgentError
	return errors.As(err, &agent) && denials[status.Code(agent.Err)]
}

// garbled tells whether the agent was heard but not understood: all errors of the way to it are gRPC's.
func garbled(err error) bool {
	_, grpc := status.FromError(err)
	return !grpc && !errors.Is(err, errMute)
}
