// Module ejbca stands in for the EJBCA client that one of spire-server's built-in plugins imports. The real one's zip is
// not served by every module proxy, and no test uses that plugin.
module github.com/Keyfactor/ejbca-go-client-sdk

go 1.26.0
