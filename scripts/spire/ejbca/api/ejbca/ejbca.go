// Package ejbca has the names that spire-server's ejbca plugin compiles against; every call fails.
package ejbca

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http"
)

var errAbsent = errors.New("EJBCA is not built in")

type (
	Authenticator                     interface{ GetHTTPClient() (*http.Client, error) }
	Builder                           struct{}
	Configuration                     struct{ Host string }
	APIClient                         struct{ V1CertificateApi *V1CertificateApiService }
	V1CertificateApiService           struct{}
	ApiEnrollPkcs10CertificateRequest struct{}
	EnrollCertificateRestRequest      struct{}
	CertificateRestResponse           struct{ CertificateChain []string }
	GenericOpenAPIError               struct{}
)

func NewMTLSAuthenticatorBuilder() *Builder                              { return &Builder{} }
func (b *Builder) WithClientCertificate(*tls.Certificate) *Builder       { return b }
func (b *Builder) WithCaCertificates([]*x509.Certificate) *Builder       { return b }
func (*Builder) Build() (Authenticator, error)                           { return nil, errAbsent }
func NewConfiguration() *Configuration                                   { return &Configuration{} }
func (*Configuration) SetAuthenticator(Authenticator)                    {}
func NewAPIClient(*Configuration) (*APIClient, error)                    { return nil, errAbsent }
func NewEnrollCertificateRestRequest() *EnrollCertificateRestRequest     { return nil }
func (*EnrollCertificateRestRequest) SetUsername(string)                 {}
func (*EnrollCertificateRestRequest) SetPassword(string)                 {}
func (*EnrollCertificateRestRequest) SetCertificateRequest(string)       {}
func (*EnrollCertificateRestRequest) SetCertificateAuthorityName(string) {}
func (*EnrollCertificateRestRequest) SetCertificateProfileName(string)   {}
func (*EnrollCertificateRestRequest) SetEndEntityProfileName(string)     {}
func (*EnrollCertificateRestRequest) SetIncludeChain(bool)               {}
func (*EnrollCertificateRestRequest) SetAccountBindingId(string)         {}
func (*CertificateRestResponse) GetResponseFormat() string               { return "" }
func (*CertificateRestResponse) GetCertificate() string                  { return "" }
func (*GenericOpenAPIError) Error() string                               { return errAbsent.Error() }
func (*GenericOpenAPIError) Body() []byte                                { return nil }

func (V1CertificateApiService) EnrollPkcs10Certificate(context.Context) ApiEnrollPkcs10CertificateRequest {
	return ApiEnrollPkcs10CertificateRequest{}
}

func (r ApiEnrollPkcs10CertificateRequest) EnrollCertificateRestRequest(
	EnrollCertificateRestRequest,
) ApiEnrollPkcs10CertificateRequest {
	return r
}

func (ApiEnrollPkcs10CertificateRequest) Execute() (*CertificateRestResponse, *http.Response, error) {
	return nil, nil, errAbsent
}
